"""``lrvd_config.json``: the words and numbers that a folder stores of its model."""

import re
import warnings
from collections.abc import Mapping, Sequence
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
from lrvd_pyro.storage.fingerprint import fingerprint, fingerprint_form
from lrvd_pyro.storage.hashes import CONFIG, check_hashes
from lrvd_pyro.storage.peft_files import ADAPTER_CONFIG, live_config, plain_name
from lrvd_pyro.storage.schema import (
    Misfit,
    anything,
    flag,
    list_of,
    number,
    optional,
    record,
    short,
    table_of,
    text,
    whole,
)
from lrvd_pyro.storage.spec import describe

__all__ = [
    "Parts",
    "Tensors",
    "check_config",
    "check_origin",
    "config_of",
    "joined",
    "parted",
    "read_config",
]

Tensors = dict[str, Tensor]  # by name
Parts = dict[str, Tensors]  # by "net", "base", "model", "prior", "likelihood", "guide"

_PARTS = ("net", "base", "model", "prior", "likelihood")
_FORMAT = 3
_HASHED = 3  # the first format with hashes of the files
_MOST_LAYERS = 1000

_described = record(
    {"name": text, "builtin": flag, "arguments": table_of(anything)}, more=True
)
_checked = record(
    {
        "adapter": text,
        "base": fingerprint_form,
        "centered": flag,
        "constant_biases": flag,
        "constants": table_of(number),
        "dtypes": table_of(text),
        "frozen": list_of(text),
        "layer_replication": optional(list_of(list_of(whole(0)))),
        "guide": _described,
        "likelihood": _described,
        "model": _described,
        "modules": list_of(text),
        "num_data": number,
        "origin": list_of(whole(0)),
        "prior": optional(_described),
        "ranks": list_of(whole(1)),
        "scalings": list_of(number),
        "use_rslora": flag,
        "versions": table_of(text),
    },
    more=True,
)


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
        "layer_replication": live_config(model).layer_replication,
        "origin": space.origin,
        "frozen": [name for name, t in joined(parts).items() if _is_frozen(t)],
        "dtypes": {name: str(t.dtype) for name, t in joined(parts).items()},
        "base": fingerprint(net, with_adapter),
    }


def read_config(folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Read and check the config of a folder, in the present format.

    Args:
        folder: The folder, for messages.
        files: The contents of all its files, by name, of which the hashes are checked.

    Raises:
        ValueError: If the config is damaged, has a newer format, or an entry is not as
            expected; or if a file has another hash.

    Warns:
        UserWarning: If a folder of an earlier version has no hashes.
    """
    path = folder / CONFIG
    config = read_json(files[CONFIG], path)
    version = config.get("format")
    if type(version) is not int or not 1 <= version <= _FORMAT:
        versions = config.get("versions")
        writer = versions.get("lrvd_pyro") if isinstance(versions, dict) else None
        raise ValueError(
            f"{path} has format {short(version)}, written by lrvd_pyro "
            f"{short(writer)}; this is lrvd_pyro {__version__}, which reads formats 1 "
            f"to {_FORMAT}: pip install -U lrvd_pyro"
        )
    if version >= _HASHED or {"hash", "hashes"} & config.keys():
        others = {name: content for name, content in files.items() if name != CONFIG}
        check_hashes(folder, config, others)
    else:
        warnings.warn(
            f"{folder} was written by an earlier version, without hashes of its files: "
            f"damage may go unseen; write it again: save(path, model, guide)",
            stacklevel=3,
        )
    try:
        if version == 1:
            config = _from_format_1(config)
        if version < _HASHED:
            config["dtypes"] = {}
            # PEFT's own file alone has it.
            config["layer_replication"] = _replication(files)
    except Misfit as error:
        raise _misfit(path, error) from None
    check_config(path, config)
    return config


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Raise a ValueError unless every entry is as expected, and they agree.

    Args:
        path: The file, for messages.
        config: The config, in the present format.
    """
    try:
        _checked(config, "")
        _check_together(config)
    except Misfit as error:
        raise _misfit(path, error) from None


def _misfit(path: Path, error: Misfit) -> ValueError:
    return ValueError(
        f"{path}: {error}; write the folder again: save(path, model, guide)"
    )


def _replication(files: Mapping[str, bytes]) -> object:
    stored = read_json(files[ADAPTER_CONFIG], Path(ADAPTER_CONFIG))
    return stored.get("layer_replication")


def _check_together(config: Mapping[str, Any]) -> None:
    """Raise a Misfit unless entries about the same modules and ranks agree."""
    modules, ranks = config["modules"], config["ranks"]
    names = [*modules, *config["constants"]]
    if len({*names}) < len(names) or not modules:
        expected = "one or more modules, each once, here or under 'constants'"
        raise Misfit("modules", modules, expected)
    for entry in ("ranks", "scalings"):
        if len(config[entry]) != len(modules):
            expected = f"one for each of the {len(modules)} modules"
            raise Misfit(entry, config[entry], expected)
    check_origin(config["origin"], ranks)
    adapter = config["adapter"]
    if not adapter or "." in adapter or hasattr(nn.ModuleDict(), adapter):
        raise Misfit("adapter", adapter, "a name that nn.ModuleDict takes")
    spans = config["layer_replication"] or ()
    for span in spans:
        if len(span) != 2 or not span[0] < span[1]:
            raise Misfit("layer_replication", span, "the first layer and the last + 1")
    if sum(last - first for first, last in spans) > _MOST_LAYERS:
        raise Misfit("layer_replication", spans, f"{_MOST_LAYERS} layers at most")
    for name in names if spans else ():
        # PEFT reads names as regular expressions, and the network has not these yet.
        if not re.fullmatch(r"[-\w. ]+", name):
            raise Misfit("modules", name, "names of modules")
    if config["num_data"] <= 0:
        raise Misfit("num_data", config["num_data"], "a positive number")


def check_origin(origin: Sequence[int], ranks: Sequence[int]) -> None:
    """Raise a Misfit unless each rank component has a number of its own."""
    if len(origin) != sum(ranks) or len({*origin}) < len(origin):
        expected = f"{sum(ranks)} different numbers, one for each rank component"
        raise Misfit("origin", origin, expected)


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
    _described(new.get("guide"), "guide")
    guide = {**new["guide"]}
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
