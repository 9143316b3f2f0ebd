"""``lrvd_config.json``: the words and numbers that a folder stores of its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft
import pyro
import torch
from torch import Tensor, nn

from lrvd_pyro import guides, likelihoods, models, priors
from lrvd_pyro._version import __version__
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.rank_space.center import center_of
from lrvd_pyro.rank_space.constant import is_frozen_bias
from lrvd_pyro.storage.atomic import read_json
from lrvd_pyro.storage.fingerprint import fingerprint
from lrvd_pyro.storage.peft_files import live_config, plain_name
from lrvd_pyro.storage.spec import describe

__all__ = ["Parts", "Tensors", "config_of", "joined", "parted", "read_config"]

Tensors = dict[str, Tensor]  # by name
Parts = dict[str, Tensors]  # by "net", "base", "model", "prior", "likelihood", "guide"

_FORMAT = 2
_PARTS = ("net", "base", "model", "prior", "likelihood")
_KEYS = {"adapter", "base", "centered", "constant_biases", "constants", "frozen"}
_KEYS |= {"guide", "likelihood", "model", "modules", "num_data", "origin", "prior"}
_KEYS |= {"ranks", "scalings", "use_rslora", "versions"}


def config_of(model: RankModel, guide: nn.Module, parts: Parts) -> dict[str, Any]:
    """Describe a model and its guide, without their tensors, for `save` to write."""
    space, net = model.space, model.base_net
    with_adapter = {plain_name(n) for part in ("net", "base") for n in parts[part]}
    objects: dict[str, Any] = {
        "model": describe(model, models),
        "prior": None if model.prior is None else describe(model.prior, priors),
        "likelihood": describe(model.likelihood, likelihoods),
        "guide": describe(guide, guides),
    }
    if isinstance(guide, RankDiagonal):
        objects["guide"]["held"] = guide.held
    versions = {m.__name__: str(m.__version__) for m in (torch, pyro, peft)}
    return {
        "format": _FORMAT,
        "versions": {"lrvd_pyro": __version__, **versions},
        **objects,
        "num_data": model.num_data,
        "adapter": space.adapter,
        "modules": space.modules,
        "ranks": space.ranks,
        # Pruning changes r and keeps the scaling, so alpha / r does not tell it.
        "scalings": [layer.scaling[space.adapter] for layer in space.layers],
        "centered": bool(center_of(space)),
        "constant_biases": is_frozen_bias(space.layers[0].lora_B[space.adapter]),
        "constants": {n: m.scaling[space.adapter] for n, m in space.constants.items()},
        "use_rslora": live_config(model).use_rslora,
        "origin": space.origin,
        "frozen": [name for name, t in joined(parts).items() if _is_frozen(t)],
        "base": fingerprint(net, with_adapter),
    }


def read_config(path: Path) -> dict[str, Any]:
    """Read the config of a folder and bring it to the present format.

    Raises:
        ValueError: If the file is missing, is damaged, has a newer format or lacks an
            entry.
    """
    config = read_json(path)
    number = config.get("format")
    if not isinstance(number, int) or number > _FORMAT:
        writer = config.get("versions", {}).get("lrvd_pyro")
        raise ValueError(
            f"{path} has format {number!r}, written by lrvd_pyro {writer}; this is "
            f"lrvd_pyro {__version__}, which reads formats up to {_FORMAT}: "
            f"pip install -U lrvd_pyro"
        )
    if number == 1:
        config = _from_format_1(config)
    missing = sorted(_KEYS - config.keys())
    if missing or not {"name", "builtin", "arguments"} <= set(config["model"]):
        raise ValueError(
            f"{path} lacks {missing} or the model's name and arguments; write the "
            f"folder again: save(path, model, guide)"
        )
    return config


def joined(parts: Parts) -> Tensors:
    """The tensors of all parts in one dict, under ``<part>.<name>``."""
    return {
        f"{part}.{name}": tensor
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
    }


def parted(tensors: Mapping[str, Tensor], format: int) -> Parts:
    """The inverse of `joined`, with names of the present format."""
    parts: Parts = {part: {} for part in _PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if format == 1 and rest.endswith(".centre"):
            rest = rest.removesuffix("centre") + "center"
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _from_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a config of version 0.1 to the present format.

    There, ``model`` was a name, and the model's arguments were entries beside it.
    """
    new = {"format": 1, **config}
    new["centered"] = new.pop("centred", False)
    gated = new.get("model") == "GateLoRA"
    argument = "weight_prior" if gated else "sides"
    arguments = {argument: new.pop(argument, None)}
    new["model"] = {"name": new.get("model"), "builtin": True, "arguments": arguments}
    guide = {"name": None, **new.get("guide", {})}
    if guide["name"] == "TiedDiagonal":  # has lost this argument
        guide["arguments"] = {
            name: value
            for name, value in guide["arguments"].items()
            if name != "learn_mean"
        }
    new["guide"] = guide
    return new


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad
