"""``lrvd_config.json``: what a folder says of its model in words and numbers."""

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

FORMAT = 2
KEYS = {"adapter", "base", "centered", "constant_biases", "constants", "frozen"}
KEYS |= {"guide", "likelihood", "model", "modules", "num_data", "origin", "prior"}
KEYS |= {"ranks", "scalings", "use_rslora", "versions"}

Tensors = dict[str, Tensor]
Parts = dict[str, Tensors]


def config_of(model: RankModel, guide: nn.Module, parts: Parts) -> dict[str, Any]:
    """What `save` writes of a model and its guide, beside their tensors."""
    space, net = model.space, model.base_net
    made: dict[str, Any] = {
        "model": describe(model, models),
        "prior": describe(model.prior, priors),
        "likelihood": describe(model.likelihood, likelihoods),
        "guide": describe(guide, guides),
    }
    if isinstance(guide, RankDiagonal):
        made["guide"]["held"] = guide.held
    versions = {m.__name__: str(m.__version__) for m in (torch, pyro, peft)}
    return {
        "format": FORMAT,
        "versions": {"lrvd_pyro": __version__, **versions},
        **made,
        "num_data": model.num_data,
        "adapter": space.adapter,
        "modules": space.modules,
        "ranks": space.ranks,
        "scalings": [layer.scaling[space.adapter] for layer in space.layers],
        "centered": bool(center_of(space)),
        "constant_biases": is_frozen_bias(space.layers[0].lora_B[space.adapter]),
        "constants": {n: m.scaling[space.adapter] for n, m in space.constants.items()},
        "use_rslora": live_config(model).use_rslora,
        "origin": space.origin,
        "frozen": [name for name, t in joined(parts).items() if _is_frozen(t)],
        "base": fingerprint(net, {plain_name(name) for name in parts["net"]}),
    }


def read_config(path: Path) -> dict[str, Any]:
    """The config of a folder, in the present format.

    Raises:
        ValueError: If the file is missing or damaged, of a newer format, or lacks
            something.
    """
    config = read_json(path)
    found = config.get("format")
    if not isinstance(found, int) or found > FORMAT:
        writer = config.get("versions", {}).get("lrvd_pyro")
        raise ValueError(
            f"{path} has format {found!r}, written by lrvd_pyro {writer}; this is "
            f"{__version__}, which reads {FORMAT} at most: "
            f"pip install -U lrvd_pyro"
        )
    if found == 1:
        config = _from_format_1(config)
    missing = sorted(KEYS - config.keys())
    if missing or not {"name", "builtin", "arguments"} <= set(config["model"]):
        raise ValueError(
            f"{path} lacks {missing} or the model's name and arguments; write the "
            f"folder again: save(path, model, guide)"
        )
    return config


def joined(parts: Parts) -> Tensors:
    """The tensors of all parts by ``<part>.<name>``."""
    return {f"{part}.{n}": t for part, own in parts.items() for n, t in own.items()}


def parted(tensors: Mapping[str, Tensor], format: int) -> Parts:
    """What `joined` was given, by names of the present format."""
    parts: Parts = {part: {} for part in ("net", "model", "prior", "likelihood")}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        if format == 1 and rest.endswith(".centre"):
            rest = rest.removesuffix("centre") + "center"
        parts.setdefault(part, {})[rest] = tensor
    return parts


def _from_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """Up to version 0.1 a model was a name, and its arguments stood beside it."""
    new = {"format": 1, **config}
    new["centered"] = new.pop("centred", False)
    gated = new.get("model") == "GateLoRA"
    argument = "weight_prior" if gated else "sides"
    arguments = {argument: new.pop(argument, None)}
    new["model"] = {"name": new.get("model"), "builtin": True, "arguments": arguments}
    guide = {"name": None, **new.get("guide", {})}
    if guide["name"] == "TiedDiagonal":
        guide["arguments"] = {
            name: value
            for name, value in guide["arguments"].items()
            if name != "learn_mean"
        }
    new["guide"] = guide
    return new


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad
