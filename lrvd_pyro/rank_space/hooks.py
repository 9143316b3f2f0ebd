"""The hooks through which a draw enters the forward pass of a PEFT LoRA layer.

A layer computes ``W0 x + scaling * lora_B(lora_A(x))``. A pre-hook on ``lora_B``
multiplies the rank activations by a gate. Forward hooks on ``lora_A`` and ``lora_B``
replace the output by that of a drawn weight. The hooks only read a `Bank`, and never
sample: activation checkpointing would draw a second time in the backward pass. They are
objects, not closures: a network with closures cannot be pickled, and the closures of a
copied network would read the original's draws.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lrvd_pyro._compat.peft import caches_dora_norms
from lrvd_pyro._compat.torch import forward_hooks
from lrvd_pyro.rank_space.bank import Bank, Kind
from lrvd_pyro.rank_space.drawn import output_of, spread

__all__ = ["GateHook", "WeightHook", "obstacle", "own_hooks"]


class GateHook:
    """Pre-hook on ``lora_B``: rank activations ``h``, ``... x r``, become ``z h``.

    Where ``lora_B`` has a center c, they become ``c + z (h - c)``.
    """

    def __init__(self, bank: Bank, index: int) -> None:
        self.bank, self.index, self.fired = bank, index, False
        self.float16 = False  # whether the last pass came here in float16

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...] | None:
        gate = self.bank.read("gate", self.index)
        self.fired, self.float16 = True, args[0].dtype is torch.float16
        if gate is None:
            return None
        h = args[0]
        gate = gate.to(
            h
        )  # else a float32 gate widens h, which a bfloat16 lora_B refuses
        center = getattr(module, "center", None)
        # In a linear layer h is rows x tokens x r. In a convolution it is rows x r x
        # space: there the rank axis has trailing axes.
        trailing = len(getattr(module, "kernel_size", ()))
        if gate.dim() == 2:
            gate = spread(gate, h, trailing)
        else:
            gate = gate.view(-1, *[1] * trailing)
        if center is None:
            return (h * gate, *args[1:])
        center = center.to(h).view(-1, *[1] * trailing)
        # lerp gives h bit for bit where the gate is 1; the plain formula rounds there
        return (torch.lerp(center, h, gate), *args[1:])


class WeightHook:
    """Forward hook on ``lora_A`` or ``lora_B``: the output by a drawn weight.

    A hook and not torch's parametrize, which allows one weight per batch only, and
    renames the keys of the state dict.
    """

    def __init__(self, bank: Bank, kind: Kind, index: int) -> None:
        self.bank, self.kind, self.index = bank, kind, index

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        weight = self.bank.read(self.kind, self.index)
        if weight is None:
            return None
        return output_of(module, args[0], weight.to(args[0]))


def own_hooks(
    modules: Iterable[nn.Module], bank: Bank
) -> list[tuple[dict[int, Any], int, Any]]:
    """The hooks that read ``bank`` on these modules.

    Returns:
        For each hook the dict that holds it, its key there, and the hook.
    """
    # found by a search, since a copied network has the hooks and no handles to them;
    # a lora_B that has both kinds of hook occurs twice among the modules
    return [
        (hooks, key, hook)
        for module in dict.fromkeys(modules)
        for hooks in forward_hooks(module)
        for key, hook in hooks.items()
        if getattr(hook, "bank", None) is bank
    ]


def obstacle(layer: LoraLayer, adapter: str, gate: GateHook) -> tuple[str, str] | None:
    """Why no draw can enter a layer now, and the call that helps; None if one can."""
    if adapter not in layer.lora_B:
        return "was deleted", "build the model on another adapter"
    if gate not in forward_hooks(layer.lora_B[adapter])[0].values():
        return "was replaced, or its RankSpace closed,", "make the model again"
    if adapter in layer.lora_variant and caches_dora_norms():
        return "has a cached weight norm", "leave peft.helpers.DoraCaching()"
    if layer.merged:
        return "is merged", "call net.unmerge_adapter()"
    if layer.disable_adapters:
        return "is disabled", (
            "leave net.disable_adapter(), or call net(**batch) itself; without a "
            "PeftModel, call net.enable_adapters()"
        )
    if adapter not in layer.active_adapters:
        return "is not active", f"call net.set_adapter({adapter!r})"
    return None
