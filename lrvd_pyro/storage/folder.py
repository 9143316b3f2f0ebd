"""A posterior on disk: files for plain PEFT, and beside them those of this library.

A saved folder holds

- ``adapter_config.json`` and ``adapter_model.safetensors``: the mean adapter as PEFT
  itself would write it, without the rest of the posterior;
- ``lrvd_config.json``: format and versions; model, prior, likelihood and guide by class
  name with their arguments; the number of data, the modules and ranks; the fingerprint
  of the base, and the hash of every file;
- ``lrvd_posterior.safetensors``: A, B and the head as they train, the running
  statistics of the base, and the parameters of guide, prior and likelihood.

Nothing is pickled, no name is imported, and every entry is checked before it is used.
So a folder from a stranger runs no code.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

from lrvd_pyro import likelihoods, priors
from lrvd_pyro.inference.pairs import paired
from lrvd_pyro.likelihoods import Likelihood
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.priors import Prior
from lrvd_pyro.rank_space.base_buffers import base_buffers
from lrvd_pyro.rank_space.center import center_at
from lrvd_pyro.storage.atomic import (
    AnyPath,
    read_folder,
    read_json,
    read_tensors,
    written_whole,
)
from lrvd_pyro.storage.build import build, build_guide, build_model
from lrvd_pyro.storage.config import (
    Parts,
    Tensors,
    check_config,
    config_of,
    joined,
    parted,
    read_config,
)
from lrvd_pyro.storage.embeddings import (
    embeddings,
    refuse_other_rows,
    resized_embeddings,
)
from lrvd_pyro.storage.export import plain_adapter
from lrvd_pyro.storage.fingerprint import compare_base, refuse_adapters
from lrvd_pyro.storage.fit import check_fit, refuse_infinite
from lrvd_pyro.storage.hashes import CONFIG, seal
from lrvd_pyro.storage.peft_config import read_adapter_config
from lrvd_pyro.storage.peft_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    adapted,
    adapter_state,
    plain_name,
    write_adapter,
    write_tensors,
)
from lrvd_pyro.storage.refusals import warn_of_moved_buffers
from lrvd_pyro.storage.restoring import match_base, restore
from lrvd_pyro.storage.transaction import told_of, unchanged_on_error

__all__ = ["load", "save"]

_POSTERIOR = "lrvd_posterior.safetensors"
_FILES = (CONFIG, _POSTERIOR, ADAPTER_CONFIG, ADAPTER)


def save(path: AnyPath, model: RankModel, guide: nn.Module) -> Path:
    """Write a model and its guide to a folder, whole or not at all.

    The docstring of `lrvd_pyro.storage.folder` lists the files. A folder that `save`
    wrote before is replaced.

    Example::

        save("posterior", model, guide)
        PeftModel.from_pretrained(base, "posterior")     # the mean, in plain PEFT
        model, guide = load("posterior", base)           # to predict or to train on

    Args:
        path: The folder.
        model: A `GateLoRA`, a `FactorLoRA`, or a `RankModel` of your own.
        guide: Its guide, a module.

    Returns:
        The path.

    Raises:
        TypeError: If ``model`` is not a `RankModel`, or the guide is a function.
        ValueError: If the folder holds other files; if the guide belongs to another
            model or has no parameters yet; if a tensor has NaN or infinity; or if the
            adapter alone does not make the network.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.
        OSError: If the disk is full or read-only; ``path`` stays as it was.
    """
    paired(model, guide)
    if not isinstance(model, RankModel):
        raise TypeError(
            f"model is a {type(model).__name__}; expected a models.RankModel, such as "
            f"GateLoRA(net, num_data=len(train))"
        )
    if not isinstance(guide, nn.Module):
        raise TypeError(
            f"guide is a {type(guide).__name__}, whose parameters are in Pyro's store "
            f"alone; make it a PyroModule, such as guides.RankDiagonal(model)"
        )
    model.latent_sites()  # a prior may make its tensors when it first runs
    adapter = plain_adapter(model, guide, drop=False)
    warn_of_moved_buffers(model)
    parts = _parts(model, guide)
    parts["base"] |= resized_embeddings(model.base_net)
    refuse_infinite(joined(parts))
    config = json.dumps(config_of(model, guide, parts), indent=2)
    _check_loadable(Path(path), json.loads(config), adapter[0])
    with written_whole(path, _FILES) as folder:
        write_adapter(folder, *adapter, model.base_net)
        write_tensors(folder / _POSTERIOR, joined(parts))
        (folder / CONFIG).write_text(config)
        seal(folder)
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
    check_base: bool = True,
) -> tuple[RankModel, Any]:
    """Read the model and guide of a folder that `save` wrote, to predict or to train.

    ``net`` is the base without PEFT, made as for training. `load` adds the adapter to
    it, at the saved ranks. Predictions at a seed are those from before saving, bit for
    bit. Optimizer and random state are not stored: use `lrvd_pyro.checkpoint`.

    Example::

        net = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
        model, guide = load("posterior", net)

    Models, priors, likelihoods and guides of this library are made from their names.
    Pass any other one; its name is checked.

    Args:
        path: The folder.
        net: The base network, without PEFT; if loading fails, it stays without.
        model: The model's class, for one that is not of this library. What JSON cannot
            hold stands in a partial of it, ``functools.partial(Own, rates=rates)``, or
            in a function of the same arguments.
        prior: The model's prior, if its class is not of this library.
        likelihood: The model's likelihood, if its class is not of this library.
        guide: The guide's class, a partial of it, or a function from the model to the
            guide. AutoGuides make their parameters when called: call ``guide(**batch)``
            in the function.
        weight_prior: The model's weight prior, if it is not a distribution with scalar
            parameters.
        check_base: Whether to compare names, shapes and values of the base with those
            that were saved. False takes any base to which the adapter fits, such as
            full precision after training on 8 or 4 bits.

    Returns:
        The model and the guide.

    Raises:
        TypeError: If ``net`` is already a PEFT model.
        ValueError: If a file is missing, is damaged, has a newer format or does not fit
            the others; if ``net`` is another base; or if an object must be passed, or
            is not the one that was saved. Network and generators have not changed then.

    Warns:
        UserWarning: If the folder is of an earlier version, whose files have no hashes.
    """
    folder = Path(path)
    files = read_folder(folder, _FILES)
    config = read_config(folder, files)
    tensors = read_tensors(files[_POSTERIOR], folder / _POSTERIOR)
    saved = parted(tensors, config["format"])
    stored = read_json(files[ADAPTER_CONFIG], folder / ADAPTER_CONFIG)
    adapter_config = read_adapter_config(
        folder / ADAPTER_CONFIG, stored, config["layer_replication"]
    )
    refuse_adapters(net)
    with_adapter = {plain_name(name): tensor for name, tensor in saved["net"].items()}
    if check_base:
        with_adapter = saved["base"] | with_adapter
        compare_base(folder, net, config, with_adapter)
    refuse_other_rows(folder, net, with_adapter)
    with told_of(folder):
        check_fit(folder, config, saved, net)
    values = base_buffers(net).values()  # which a guide's first call may move
    store = pyro.get_param_store()
    with unchanged_on_error(net, store, values=values), told_of(folder):
        given: dict[str, Any] = {
            "prior": build(folder, config, "prior", prior, priors),
            "likelihood": build(folder, config, "likelihood", likelihood, likelihoods),
        }
        given = {name: part for name, part in given.items() if part is not None}
        if weight_prior is not None:
            given["weight_prior"] = weight_prior
        peft_net = adapted(net, config, adapter_config)
        loaded = build_model(folder, config, model, peft_net, given)
        loaded.space.origin = tuple(config["origin"])
        if config["centered"]:
            center_at(loaded.space, torch.zeros(loaded.space.size))
        loaded.latent_sites()  # a prior may make its tensors when it first runs
        its_guide = build_guide(folder, config, guide, loaded)
        parts = _parts(loaded, its_guide)
        own = embeddings(peft_net).items()
        parts["base"] |= {name: part for name, part in own if name in saved["base"]}
        if not check_base or config["format"] < 3:
            match_base(parts, saved)
        restore(folder / _POSTERIOR, parts, saved, set(config["frozen"]))
    return loaded, its_guide


def _parts(model: RankModel, guide: nn.Module) -> Parts:
    """Every tensor to store, itself and not a copy, by part and name."""
    net = model.base_net
    # A guide that holds its model as a child has the base among its own parameters.
    whole = set(net.state_dict(keep_vars=True).values())
    parts: Parts = {"net": adapter_state(net, model.space.adapter)}
    parts["base"] = base_buffers(net)
    for part in ("prior", "likelihood"):
        parts[part] = _state(getattr(model, part))
    # The scale is an argument of the guide, and so in the config.
    its = {n: t for n, t in _state(guide).items() if n != "_extra_state"}
    parts["guide"] = {n: t for n, t in its.items() if t not in whole}
    elsewhere = ("net.", "prior.", "likelihood.")
    parts["model"] = {
        name: tensor
        for name, tensor in _state(model).items()
        if not name.startswith(elsewhere)
    }
    return parts


def _check_loadable(path: Path, config: dict[str, Any], lora: Any) -> None:
    """Raise a ValueError if `load` would refuse what `save` is about to write."""
    check_config(path / CONFIG, config)
    stored = json.loads(json.dumps(lora.to_dict(), default=list))
    replication = config["layer_replication"]
    read_adapter_config(path / ADAPTER_CONFIG, stored, replication)


def _state(module: object) -> Tensors:
    """The parameters and buffers of a module, uncopied; none of a function."""
    if not isinstance(module, nn.Module):
        return {}
    state: Tensors = module.state_dict(keep_vars=True)
    return state
