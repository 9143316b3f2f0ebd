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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pyro
import torch
from peft import LoraConfig
from torch import Tensor, nn

from lrvd_pyro import guides, likelihoods, models, priors
from lrvd_pyro._version import __version__
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.center import center_at, center_of
from lrvd_pyro.rank_space.constant import is_frozen_bias
from lrvd_pyro.selection.removal import check_pair
from lrvd_pyro.storage.atomic import (
    AnyPath,
    read_json,
    read_tensors,
    recover,
    written_whole,
)
from lrvd_pyro.storage.export import plain_adapter
from lrvd_pyro.storage.fingerprint import check_base, fingerprint
from lrvd_pyro.storage.peft_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapted,
    adapter_state,
    live_config,
    plain_name,
    write_adapter,
    write_tensors,
)
from lrvd_pyro.storage.spec import (
    build,
    build_guide,
    build_weight_prior,
    builtins,
    describe,
    encode,
)

FORMAT = 1
CONFIG, POSTERIOR = "lrvd_config.json", "lrvd_posterior.safetensors"
KEYS = {"adapter", "base", "centered", "constant_biases", "constants", "frozen"}
KEYS |= {"guide", "likelihood", "model", "modules", "num_data", "origin", "prior"}
KEYS |= {"ranks", "scalings", "sides", "use_rslora", "versions", "weight_prior"}

Tensors = dict[str, Tensor]
Parts = dict[str, Tensors]


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
        model: A `GateLoRA` or `FactorLoRA`.
        guide: Its guide, a module.

    Returns:
        The path.

    Raises:
        TypeError: If the model is another one, or the guide is a function.
        ValueError: If the folder holds other files, the guide belongs to another model
            or has no parameters yet, or the adapter alone does not make the network.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.
    """
    if builtins(models).get(type(model).__name__) is not type(model):
        raise TypeError(
            f"model is a {type(model).__name__}; expected one of "
            f"{sorted(builtins(models))} of lrvd_pyro.models"
        )
    if not isinstance(guide, nn.Module):
        raise TypeError(
            f"guide is a {type(guide).__name__}, whose parameters stand in Pyro's "
            f"store alone; make it a PyroModule, such as guides.RankDiagonal(model)"
        )
    if isinstance(guide, RankDiagonal):
        check_pair(model, guide)
    adapter = plain_adapter(model, guide, drop=False)
    parts = _parts(model, guide)
    config = json.dumps(_config(model, guide, parts), indent=2)
    with written_whole(path, {ADAPTER_CONFIG, ADAPTER, CONFIG, POSTERIOR}) as folder:
        write_adapter(folder, *adapter, model.base_net)
        write_tensors(folder / POSTERIOR, _joined(parts))
        (folder / CONFIG).write_text(config)
    return Path(path)


def load(
    path: AnyPath,
    net: nn.Module,
    *,
    prior: Any = None,
    likelihood: Any = None,
    guide: Callable[[Any], nn.Module] | None = None,
    weight_prior: torch.distributions.Distribution | None = None,
) -> tuple[RankModel, Any]:
    """The model and guide of a folder that `save` wrote, to predict with or to train.

    ``net`` is the base without PEFT, made as for training; its adapter is put into it
    here, at the saved ranks. Predictions at a seed are those before saving, bit for
    bit. Optimizer and random state are not part of it.

    Example::

        net = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
        model, guide = load("posterior", net)

    Priors, likelihoods and guides of this library are made anew from their names. Any
    other is passed, and its name checked.

    Args:
        path: The folder.
        net: The base network, without PEFT; if loading fails it is so again.
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
    config = _read_config(folder / CONFIG)
    saved = _split(read_tensors(folder / POSTERIOR))
    adapter_config = _read_adapter_config(folder)
    check_base(folder, net, config, saved["net"])
    given = {
        "prior": build(folder, config, "prior", prior, priors),
        "likelihood": build(folder, config, "likelihood", likelihood, likelihoods),
    }
    if config["model"] == "GateLoRA":
        given["weight_prior"] = build_weight_prior(folder, config, weight_prior)
    else:
        given["sides"] = tuple(config["sides"])
    with adapted(net, config, adapter_config) as peft_net:
        model = builtins(models)[config["model"]](
            peft_net, num_data=config["num_data"], adapter=config["adapter"], **given
        )
        model.space.origin = tuple(config["origin"])
        if config["centered"]:
            center_at(model.space, torch.zeros(model.space.size))
        loaded = build_guide(folder, config, guide, model)
        _restore(folder, _parts(model, loaded), saved, set(config["frozen"]))
    return model, loaded


def _config(model: RankModel, guide: nn.Module, parts: Parts) -> dict[str, Any]:
    space, net = model.space, model.base_net
    made = {
        "prior": (model.prior, priors),
        "likelihood": (model.likelihood, likelihoods),
    }
    described = {part: describe(*pair) for part, pair in made.items()}
    described["guide"] = describe(guide, guides)
    if isinstance(guide, RankDiagonal):
        described["guide"]["held"] = guide.held
    versions = {m.__name__: str(m.__version__) for m in (torch, pyro, peft)}
    tensors = _joined(parts).items()
    return {
        "format": FORMAT,
        "versions": {"lrvd_pyro": __version__, **versions},
        "model": type(model).__name__,
        **described,
        "weight_prior": encode(getattr(model, "weight_prior", None)),
        "num_data": model.num_data,
        "adapter": space.adapter,
        "sides": space.sides,
        "modules": space.modules,
        "ranks": space.ranks,
        "scalings": [layer.scaling[space.adapter] for layer in space.layers],
        "centered": bool(center_of(space)),
        "constant_biases": _biases_are_constant(model),
        "constants": {n: m.scaling[space.adapter] for n, m in space.constants.items()},
        "use_rslora": live_config(model).use_rslora,
        "origin": space.origin,
        "frozen": [name for name, t in tensors if _is_frozen(t)],
        "base": fingerprint(net, {plain_name(name) for name in parts["net"]}),
    }


def _parts(model: RankModel, guide: nn.Module) -> Parts:
    """Every tensor to keep: the objects that train, by part and name."""
    net = model.base_net
    whole = set(net.state_dict(keep_vars=True).values())
    own = {"prior": model.prior, "likelihood": model.likelihood, "guide": guide}
    parts = {"net": adapter_state(net, model.space.adapter)}
    for part, module in own.items():
        state = (
            module.state_dict(keep_vars=True) if isinstance(module, nn.Module) else {}
        )
        parts[part] = {name: t for name, t in state.items() if t not in whole}
    return parts


def _joined(parts: Parts) -> Tensors:
    return {f"{part}.{n}": t for part, own in parts.items() for n, t in own.items()}


def _split(tensors: Mapping[str, Tensor]) -> Parts:
    parts: Parts = {"net": {}, "prior": {}, "likelihood": {}, "guide": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _biases_are_constant(model: RankModel) -> bool:
    """Whether `gauge.center` gave the adapter its biases, and no training."""
    space = model.space
    return is_frozen_bias(space.layers[0].lora_B[space.adapter])


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _read_config(path: Path) -> dict[str, Any]:
    config = read_json(path)
    found = config.get("format")
    if not isinstance(found, int) or found > FORMAT:
        writer = config.get("versions", {}).get("lrvd_pyro")
        raise ValueError(
            f"{path} has format {found!r}, written by lrvd_pyro {writer}; this is "
            f"{__version__}, which reads {FORMAT} at most: "
            f"pip install -U lrvd_pyro"
        )
    missing = sorted(KEYS - config.keys())
    if missing or config["model"] not in builtins(models):
        raise ValueError(
            f"{path} lacks {missing} or names the model {config.get('model')!r}; "
            f"expected {sorted(builtins(models))}: write it anew, "
            f"save(path, model, guide)"
        )
    return config


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
    ours, theirs = _joined(parts), _joined(saved)
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
