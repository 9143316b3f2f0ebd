"""The fingerprint of a base network: a few values of every frozen parameter."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lrvd_pyro._compat.transformers import tied_names
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.rank_space.names import is_adapters, plain_name
from lrvd_pyro.storage.embeddings import way_out
from lrvd_pyro.storage.schema import list_of, number, record, table_of, text, whole

__all__ = [
    "Fingerprint",
    "compare_base",
    "differences",
    "fingerprint",
    "fingerprint_form",
    "refuse_adapters",
]

Fingerprint = dict[str, dict[str, Any]]  # dtype, shape and values, by parameter name

fingerprint_form = table_of(
    record({"dtype": text, "shape": list_of(whole(0)), "values": list_of(number)})
)

_SAMPLES = 4
_FULL = {f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16")}


def fingerprint(net: nn.Module, without: Collection[str]) -> Fingerprint:
    """Sketch each parameter of a base by its precision, its shape and some values.

    Parameters that belong to an adapter are left out. Names are those of the network
    without PEFT; a parameter that two modules share has the first one.

    Args:
        net: A network, with PEFT or without.
        without: Names of parameters that come with the adapter, such as a head's.
    """
    named = {n: p for n, p in _parameters(net).items() if n not in without}
    first = {parameter: name for name, parameter in reversed(named.items())}
    return {n: _sketch(p) for n, p in named.items() if first[p] == n}


def refuse_adapters(net: nn.Module) -> None:
    """Raise a TypeError if a network is a PEFT model, or has adapters of its own."""
    if isinstance(net, PeftModel):
        raise TypeError(
            f"net is a {type(net).__name__}; expected the base without PEFT, since "
            f"load adds the saved adapter itself: load(path, net.unload())"
        )
    if any(isinstance(module, BaseTunerLayer) for module in net.modules()):
        raise TypeError(
            f"net is a {type(net).__name__} with adapters of its own; expected the "
            f"base without PEFT, since load adds the saved adapter itself: make net by "
            f"from_pretrained(...), without net.add_adapter"
        )


def compare_base(
    folder: Path, net: nn.Module, config: Mapping[str, Any], saved: Collection[str]
) -> None:
    """Raise unless ``net`` is the base that a folder was saved from.

    Args:
        folder: The folder of the config, for the message.
        net: The network to check, without PEFT.
        config: The config that `lrvd_pyro.save` wrote.
        saved: Names of the tensors that come with the adapter.

    Raises:
        ValueError: If ``net`` is another base.
    """
    without = {plain_name(name) for name in saved}
    if unlike := differences(net, config["base"], without):
        raise ValueError(
            f"net is not the base that {folder} was saved from: "
            f"{'; '.join(unlike[:3])} ({len(unlike)} differences); pass that base, "
            f"made by the same from_pretrained(...) with the same options. To load it "
            f"all the same, as onto another precision: load(path, net, "
            f"check_base=False){way_out(net, unlike)}"
        )


def differences(
    net: nn.Module, saved: Fingerprint, without: Collection[str]
) -> list[str]:
    """List in words where a network differs from the fingerprint of another.

    Values are compared exactly where the precision is the same, and to 1% elsewhere.
    Values that are not there, as on the meta device, are no difference.

    Args:
        net: The network, with PEFT or without.
        saved: The fingerprint of the other.
        without: Names of parameters that come with the adapter.
    """
    present = _parameters(net)
    then = {name: each for name, each in saved.items() if name not in without}
    missing = [f"{name} is missing" for name in then if name not in present]
    known = _with_second_names(net, present, {*then, *without})
    more = [f"{name} is one too many" for name in present if name not in known]
    both = {n: (_sketch(present[n]), then[n]) for n in then if n in present}
    unlike = {name: _difference(*sketches) for name, sketches in both.items()}
    return missing + more + [f"{name} {how}" for name, how in unlike.items() if how]


def _parameters(net: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters by their names without PEFT."""
    named = plain_net(net).named_parameters(remove_duplicate=False)
    return {plain_name(full): each for full, each in named if not is_adapters(full)}


def _with_second_names(
    net: nn.Module, present: Mapping[str, nn.Parameter], known: Collection[str]
) -> set[str]:
    """Add the other names of parameters that modules share.

    Offloading makes two parameters of a shared one, of which Transformers still knows.
    """
    shared = {parameter for name, parameter in present.items() if name in known}
    again = {name for name, parameter in present.items() if parameter in shared}
    tied = tied_names(plain_net(net)).items()
    return {*known, *again, *(name for name, first in tied if first in known)}


def _sketch(parameter: nn.Parameter) -> dict[str, Any]:
    """Take evenly spaced values, the last one among them."""
    dtype, values = str(parameter.dtype), list[float]()
    if dtype in _FULL and parameter.numel() and _is_there(parameter):
        flat = parameter.detach().reshape(-1)
        last = len(flat) - 1
        index = [last * (i + 1) // _SAMPLES for i in range(_SAMPLES)]
        values = flat[torch.tensor(index, device=flat.device)].double().tolist()
        values = [value for value in values if math.isfinite(value)]  # for JSON
    return {"dtype": dtype, "shape": list(parameter.shape), "values": values}


def _is_there(parameter: nn.Parameter) -> bool:
    """Whether the values lie in this process's memory, in torch's own layout.

    Weights on disk are on the meta device here. Sharded and quantized ones may have a
    class of their own.
    """
    return not parameter.is_meta and type(parameter.data) is Tensor


def _difference(mine: dict[str, Any], theirs: dict[str, Any]) -> str:
    """Say how a parameter differs, after its name; empty if it does not."""
    kinds = mine["dtype"], theirs["dtype"]
    # Quantized weights may have another shape, so their precision is named first.
    if kinds[0] != kinds[1] and not _FULL.issuperset(kinds):
        return f"is stored as {kinds[0]}, not as {kinds[1]}"
    if mine["shape"] != theirs["shape"]:
        return f"has shape {mine['shape']}, not {theirs['shape']}"
    if _alike(mine, theirs):
        return ""
    return f"has the values {mine['values']}, not {theirs['values']}"


def _alike(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether values agree; a base in bfloat16 may stand for the same in float32."""
    if not (mine["values"] and theirs["values"]):
        return True
    exact = mine["dtype"] == theirs["dtype"]
    near = {"rel_tol": 0.0 if exact else 1e-2, "abs_tol": 0.0 if exact else 1e-6}
    if len(mine["values"]) != len(theirs["values"]):
        return False
    pairs = zip(mine["values"], theirs["values"], strict=True)
    return all(a == b or math.isclose(a, b, **near) for a, b in pairs)
