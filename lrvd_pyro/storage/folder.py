"""A posterior on disk: what plain PEFT reads, and beside it what this library needs.

A saved folder holds

- ``adapter_config.json`` and ``adapter_model.safetensors``: the mean adapter, as PEFT
  itself would write it; it knows no more of a posterior;
- ``lrvd_config.json``: format and versions, prior, likelihood and guide by class name
  with their arguments, the number of data, modules, ranks, and what tells the base;
- ``lrvd_posterior.safetensors``: A, B and the head as they train, and the parameters of
  guide, prior and likelihood.

Nothing is pickled, so that a folder from a stranger runs no code.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from lrvd_pyro import likelihoods, priors
from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.likelihoods import Likelihood
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.priors import Prior
from lrvd_pyro.rank_space.center import center_at
from lrvd_pyro.selection.removal import check_pair
from lrvd_pyro.storage.atomic import (
    AnyPath,
    read_json,
    read_tensors,
    recover,
    written_whole,
)
from lrvd_pyro.storage.config import (
    Parts,
    Tensors,
    config_of,
    joined,
    parted,
    read_config,
)
from lrvd_pyro.storage.export import plain_adapter
from lrvd_pyro.storage.fingerprint import check_base
from lrvd_pyro.storage.peft_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapted,
    adapter_state,
    write_adapter,
    write_tensors,
)
from lrvd_pyro.storage.spec import build, build_guide, build_model

CONFIG, POSTERIOR = "lrvd_config.json", "lrvd_posterior.safetensors"


def save(path: AnyPath, model: RankModel, guide: nn.Module) -> Path:
    """Write a model and its guide to a folder, whole or not at all.

    The head of this file says what the folder holds. One that `save` wrote before is
    replaced.

    Example::

        save("posterior", model, guide)
        PeftModel.from_pretrained(base, "posterior")     # its mean, for anyone
        model, guide = load("posterior", base)           # to predict, or to go on

    Args:
        path: The folder.
        model: A `GateLoRA`, `FactorLoRA`, or one of your own.
        guide: Its guide, a module.

    Returns:
        The path.

    Raises:
        TypeError: If the model is another one, or the guide is a function.
        ValueError: If the folder holds other files, the guide belongs to another model
            or has no parameters yet, or the adapter alone does not make the network.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.
    """
    if not isinstance(model, RankModel):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a models.RankModel, such as "
            f"GateLoRA(net, num_data=len(train))"
        )
    if not isinstance(guide, nn.Module):
        raise TypeError(
            f"guide is a {type(guide).__name__}, whose parameters stand in Pyro's "
            f"store alone; make it a PyroModule, such as guides.RankDiagonal(model)"
        )
    if isinstance(guide, RankGuide):
        check_pair(model, guide)
    adapter = plain_adapter(model, guide, drop=False)
    parts = _parts(model, guide)
    config = json.dumps(config_of(model, guide, parts), indent=2)
    with written_whole(path, {ADAPTER_CONFIG, ADAPTER, CONFIG, POSTERIOR}) as folder:
        write_adapter(folder, *adapter, model.base_net)
        write_tensors(folder / POSTERIOR, joined(parts))
        (folder / CONFIG).write_text(config)
    return Path(path)


def load(
    path: AnyPath,
    net: nn.Module,
    *,
    model: Callable[..., RankModel] | None = None,
    prior: Prior | None = None,
    likelihood: Likelihood | None = None,
    guide: Callable[[RankModel], nn.Module] | None = None,
    weight_prior: torch.distributions.Distribution | None = None,
) -> tuple[RankModel, Any]:
    """The model and guide of a folder that `save` wrote, to predict with or to train.

    ``net`` is the base without PEFT, made as for training; its adapter is put into it
    here, at the saved ranks. Predictions at a seed are those before saving, bit for
    bit. Optimizer and random state are not part of it.

    Example::

        net = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
        model, guide = load("posterior", net)

    Models, priors, likelihoods and guides of this library are made from their names.
    Any other is passed, and its name checked.

    Args:
        path: The folder.
        net: The base network, without PEFT; if loading fails it is so again.
        model: The model's class, or a function with its arguments, if it is not of this
            library.
        prior: What the model was made with, if it is not of this library.
        likelihood: Likewise.
        guide: The guide's class, or a function from the model to it. AutoGuides make
            their parameters when called: let the function do so, ``guide(**batch)``.
        weight_prior: As the model's, if it is no distribution with scalar parameters.

    Returns:
        Model and guide.

    Raises:
        TypeError: If ``net`` is a PEFT model already.
        ValueError: If a file is missing, damaged, of a newer format or unlike the
            others; if ``net`` is another base; if something must be passed, or what was
            passed is not what was saved.
    """
    recover(path)
    folder = Path(path)
    config = read_config(folder / CONFIG)
    saved = parted(read_tensors(folder / POSTERIOR), config["format"])
    adapter_config = _read_adapter_config(folder)
    check_base(folder, net, config, saved["net"])
    given: dict[str, Any] = {
        "prior": build(folder, config, "prior", prior, priors),
        "likelihood": build(folder, config, "likelihood", likelihood, likelihoods),
    }
    if weight_prior is not None:
        given["weight_prior"] = weight_prior
    with adapted(net, config, adapter_config) as peft_net:
        loaded = build_model(folder, config, model, peft_net, given)
        loaded.space.origin = tuple(config["origin"])
        if config["centered"]:
            center_at(loaded.space, torch.zeros(loaded.space.size))
        its_guide = build_guide(folder, config, guide, loaded)
        _restore(folder, _parts(loaded, its_guide), saved, set(config["frozen"]))
    return loaded, its_guide


def _parts(model: RankModel, guide: nn.Module) -> Parts:
    """Every tensor to keep: the objects that train, by part and name."""
    net = model.base_net
    whole = set(net.state_dict(keep_vars=True).values())
    parts: Parts = {"net": adapter_state(net, model.space.adapter)}
    for part in ("prior", "likelihood"):
        parts[part] = _state(getattr(model, part))
    parts["guide"] = {n: t for n, t in _state(guide).items() if t not in whole}
    elsewhere = ("net.", "prior.", "likelihood.")
    parts["model"] = {
        name: tensor
        for name, tensor in _state(model).items()
        if not name.startswith(elsewhere)
    }
    return parts


def _state(module: object) -> Tensors:
    """The parameters and buffers themselves; of what is not a module, none."""
    if not isinstance(module, nn.Module):
        return {}
    state: Tensors = module.state_dict(keep_vars=True)
    return state


def _read_adapter_config(folder: Path) -> LoraConfig:
    stored = read_json(folder / ADAPTER_CONFIG)
    if stored.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} is of type {stored.get('peft_type')!r}; "
            f"expected 'LORA': write it anew, save(path, model, guide)"
        )
    config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    return config


def _restore(folder: Path, parts: Parts, saved: Parts, frozen: set[str]) -> None:
    """Let the tensors have the saved values; check all before touching one."""
    ours, theirs = joined(parts), joined(saved)
    missing, more = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    unlike = {
        name: (list(theirs[name].shape), list(tensor.shape))
        for name, tensor in ours.items()
        if name in theirs and theirs[name].shape != tensor.shape
    }
    if missing or more or unlike:
        raise ValueError(
            f"{folder / POSTERIOR} does not fit this model and guide: it lacks "
            f"{sorted(missing)}, has {sorted(more)} besides, and of the shapes (saved, "
            f"expected) {unlike} differ; pass net, prior, likelihood and guide as they "
            f"were saved"
        )
    for name, tensor in ours.items():
        tensor.data = theirs[name].to(tensor.device)
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in frozen)
