"""The points about which gates act, and what they leave behind.

About a center c, rank activations h become ``c + z (h - c)``. What a removed component
is at its center depends on no input: it goes into the bias of ``lora_B``, the
``lora_bias`` of PEFT. Center and bias are buffers of ``lora_B``: the network's device,
precision, copies and state take them along, and nobody trains them. Where nothing but
the bias is left of a layer, `Skipped` and `Constant` stand for its A and B.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def refuse_centers(layers: Iterable[LoraLayer], adapter: str) -> None:
    """Raise a TypeError if the gates of an adapter act about a center."""
    if any(hasattr(layer.lora_B[adapter], "center") for layer in layers):
        raise TypeError(
            "the adapter's gates act about a center, which drawn weights know nothing "
            "of; take it away first: gauge.center(gate_model, None)"
        )


@torch.no_grad()
def leave_center(layer: LoraLayer, adapter: str, keep: Tensor) -> None:
    """Add what goes, where ``keep`` (r,) is False, at its center to the bias."""
    lora_B: Any = layer.lora_B[adapter]
    if hasattr(lora_B, "center"):
        lora_B.bias += constant(lora_B, ~keep)


def constant(lora_B: Any, gone: Tensor) -> Tensor:
    """``B diag(gone) c``: what components add at their centers, by the share gone."""
    held: Tensor = gone.to(lora_B.center) * lora_B.center
    weight: Tensor = lora_B.weight
    return weight.flatten(1) @ held


def give_bias(layer: LoraLayer, adapter: str) -> None:
    """A bias of 0 that does not train."""
    lora_B: Any = layer.lora_B[adapter]
    del lora_B.bias
    zero = lora_B.weight.detach().new_zeros(len(lora_B.weight))
    lora_B.register_buffer("bias", zero)
    layer.lora_bias[adapter] = True


def hold_constant(layer: LoraLayer, adapter: str) -> None:
    """Let a bias alone be left of a layer of rank 1: A and B zeros, no parameter."""
    lora_A: Any = layer.lora_A[adapter]
    lora_B: Any = layer.lora_B[adapter]
    layer.lora_A[adapter] = Skipped(lora_A.weight)
    layer.lora_B[adapter] = Constant(lora_B.weight, lora_B.bias)


class Skipped(nn.Module):
    """A ``lora_A`` before a `Constant`: it has nothing to compute.

    PEFT reads its weight, a row of zeros, when it merges and for its precision.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros_like(weight.detach())
        self.register_buffer("weight", zeros, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class Constant(Skipped):
    """A ``lora_B`` of which a bias alone is left; it broadcasts over any input."""

    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight)
        self.register_buffer("bias", bias.detach())
        self.trailing = weight.dim() - 2

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.view(-1, *[1] * self.trailing)


def is_frozen_bias(lora_B: nn.Module) -> bool:
    """Whether a ``lora_B`` has a bias of `give_bias`: a buffer, which nobody trains."""
    bias = getattr(lora_B, "bias", None)
    return bias is not None and not isinstance(bias, nn.Parameter)


def is_constant(layer: LoraLayer, adapter: str) -> bool:
    """Whether `hold_constant` was called on the layer."""
    return isinstance(layer.lora_B[adapter], Constant)


def groups_of(layer: LoraLayer, adapter: str) -> int:
    """The groups of a convolution, to which its ranks are tied; 1 of other layers."""
    return getattr(layer.lora_B[adapter], "groups", 1)
