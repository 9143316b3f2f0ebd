"""How a draw enters the forward pass of a PEFT LoRA layer.

A layer computes ``W0 x + scaling * lora_B(lora_A(x))``. A pre-hook on ``lora_B``
multiplies the rank activations by a gate; forward hooks on ``lora_A`` and
``lora_B`` replace their output by that of a drawn weight. The hooks only read a
`Bank`; they are plain objects, so that the network can be pickled and copied.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from lrvd_pyro._compat.peft import caches_dora_norms
from lrvd_pyro._compat.torch import forward_hooks
from lrvd_pyro.rank_space.bank import Bank, Kind


class GateHook:
    """Pre-hook on ``lora_B``: rank activations ``h`` (``..., r``) become ``h * z``.

    Where ``lora_B`` has a center c they become ``c + z (h - c)``.
    """

    def __init__(self, bank: Bank, index: int) -> None:
        self.bank, self.index, self.fired = bank, index, False

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        self.fired = True
        gate = self.bank.read("gate", self.index)
        if gate is None:
            return None
        h = args[0]
        gate = gate.to(h)
        center = getattr(module, "center", None)
        trailing = len(getattr(module, "kernel_size", ()))
        middle = h.dim() - 2 - trailing
        if gate.dim() == 2:
            gate = repeat_rows(gate, h.shape[0])
            gate = gate.view(len(gate), *[1] * middle, gate.shape[1], *[1] * trailing)
        else:
            gate = gate.view(-1, *[1] * trailing)
        if center is None:
            return (h * gate, *args[1:])
        center = center.to(h).view(-1, *[1] * trailing)
        return (torch.lerp(center, h, gate), *args[1:])


class WeightHook:
    """Forward hook on a linear ``lora_A`` or ``lora_B``: ``x`` times a drawn weight.

    The weight is ``out x in``, or ``B x out x in`` with one weight per example.
    """

    def __init__(self, bank: Bank, kind: Kind, index: int) -> None:
        self.bank, self.kind, self.index = bank, kind, index

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        weight = self.bank.read(self.kind, self.index)
        if weight is None:
            return None
        x = args[0]
        weight, bias = weight.to(x), module.bias
        if weight.dim() == 2:
            return F.linear(x, weight, bias)  # type: ignore[arg-type]
        check_rows(len(weight), x.shape[0])
        rows = x.reshape(len(weight), -1, x.shape[-1]) @ weight.transpose(1, 2)
        rows = rows.reshape(output.shape)
        return rows if bias is None else rows + bias  # type: ignore[operator]


def own_hooks(
    modules: Iterable[nn.Module], bank: Bank
) -> list[tuple[dict[int, Any], int, Any]]:
    """The hooks of ``bank`` on these modules: where they stand, under which key."""
    return [
        (hooks, key, hook)
        for module in dict.fromkeys(modules)
        for hooks in forward_hooks(module)
        for key, hook in hooks.items()
        if getattr(hook, "bank", None) is bank
    ]


def check_rows(examples: int, rows: int) -> None:
    """Raise unless ``rows`` of the network are ``k`` consecutive rows per example."""
    if rows % examples:
        raise ValueError(
            f"the batch has {examples} examples, but a LoRA layer sees {rows} rows, "
            f"which is no multiple; draw once for the whole batch instead: "
            f'RankELBO(noise="batch")'
        )


def repeat_rows(gate: Tensor, rows: int) -> Tensor:
    """``B x r`` gates for ``rows = k B`` rows: each gate serves ``k`` rows in turn."""
    check_rows(len(gate), rows)
    copies = rows // len(gate)
    return gate if copies == 1 else gate.repeat_interleave(copies, 0)


def obstacle(layer: LoraLayer, adapter: str, gate: GateHook) -> tuple[str, str] | None:
    """Why no draw can enter a layer at present, and what to do; None if one can."""
    if adapter not in layer.lora_B:
        return "was deleted", "build the model on another adapter"
    if gate not in forward_hooks(layer.lora_B[adapter])[0].values():
        return "was replaced, or its RankSpace closed,", "make the model again"
    if adapter in layer.lora_variant and caches_dora_norms():
        return "has a cached weight norm", "leave peft.helpers.DoraCaching()"
    if layer.merged:
        return "is merged", "call net.unmerge_adapter()"
    if layer.disable_adapters:
        return "is disabled", "leave net.disable_adapter(), or call net(**batch) itself"
    if adapter not in layer.active_adapters:
        return "is not active", f"call net.set_adapter({adapter!r})"
    return None
