"""The fingerprint of a base network: a few values of every frozen parameter."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.storage.peft_files import plain_name

__all__ = ["Fingerprint", "check_base", "differences", "fingerprint"]

Fingerprint = dict[str, dict[str, Any]]  # dtype, shape and values, by parameter name

_SAMPLES = 4


def fingerprint(net: nn.Module, without: Collection[str]) -> Fingerprint:
    """Sketch each parameter of a base by its precision, its shape and some values.

    Parameters that belong to an adapter are left out. Names are those of the network
    without PEFT.

    Args:
        net: A network, with PEFT or without.
        without: Names of parameters that come with the adapter, such as a head's.
    """
    base = plain_net(net)
    return {
        name: _sketch(parameter)
        for full, parameter in base.named_parameters()
        if not _is_adapters(full) and (name := plain_name(full)) not in without
    }


def check_base(
    folder: Path, net: nn.Module, config: Mapping[str, Any], saved: Collection[str]
) -> None:
    """Raise unless ``net`` is the base that a folder was saved from, without PEFT.

    Args:
        folder: The folder of the config, for the message.
        net: The network to check.
        config: The config that `lrvd_pyro.save` wrote.
        saved: Names of the tensors that come with the adapter.

    Raises:
        TypeError: If ``net`` is a PEFT model, or has adapters of its own.
        ValueError: If ``net`` is another base.
    """
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
    present = fingerprint(net, {plain_name(name) for name in saved})
    if unlike := differences(present, config["base"]):
        raise ValueError(
            f"net is not the base that {folder} was saved from: "
            f"{'; '.join(unlike[:3])} ({len(unlike)} differences); pass that base, "
            f"made by the same from_pretrained(...) with the same options"
        )


def differences(found: Fingerprint, saved: Fingerprint) -> list[str]:
    """List in words where two networks differ.

    Values are compared exactly where the precision is the same, and to 1% elsewhere.
    """
    missing = [f"{name} is missing" for name in saved if name not in found]
    more = [f"{name} is one too many" for name in found if name not in saved]
    both = [(name, found[name], saved[name]) for name in saved if name in found]
    shapes = [
        f"{name} has shape {mine['shape']}, not {theirs['shape']}"
        for name, mine, theirs in both
        if mine["shape"] != theirs["shape"]
    ]
    values = [
        f"{name} has the values {mine['values']}, not {theirs['values']}"
        for name, mine, theirs in both
        if mine["shape"] == theirs["shape"] and not _alike(mine, theirs)
    ]
    return missing + more + shapes + values


def _is_adapters(name: str) -> bool:
    """Whether a parameter in PEFT's network belongs to an adapter, by its full name."""
    own = ("modules_to_save", "lora_", "trainable_tokens_")
    return any(part.startswith(own) for part in name.split("."))


def _sketch(parameter: Tensor) -> dict[str, Any]:
    """Take evenly spaced values, the last one among them.

    Quantized weights and weights on the meta device have no values to take.
    """
    values: list[float] = []
    if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
        flat = parameter.detach().reshape(-1)
        last = len(flat) - 1
        index = [last * (i + 1) // _SAMPLES for i in range(_SAMPLES)]
        values = flat[torch.tensor(index, device=flat.device)].double().tolist()
    return {
        "dtype": str(parameter.dtype),
        "shape": list(parameter.shape),
        "values": values,
    }


def _alike(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Whether values agree; a base in bfloat16 may stand for the same in float32."""
    exact = mine["dtype"] == theirs["dtype"]
    pairs = zip(mine["values"], theirs["values"], strict=True)
    near = {"rel_tol": 0.0 if exact else 1e-2, "abs_tol": 0.0 if exact else 1e-6}
    return len(mine["values"]) == len(theirs["values"]) and all(
        a == b or math.isclose(a, b, **near) for a, b in pairs
    )
