"""Centers of LoRA layers, and the constants that removed components leave behind.

About a center c, rank activations h become ``c + z (h - c)``. The output of a removed
component at its center does not depend on the input. It is added to the bias of
``lora_B``, which PEFT calls ``lora_bias``. Center and bias are buffers of ``lora_B``:
they follow the network's device, precision, copies and state, and are not trained.
Where only the bias of a layer is left, `_Skipped` and `_Constant` replace its A and B.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

__all__ = [
    "constant",
    "give_bias",
    "groups_of",
    "hold_constant",
    "is_constant",
    "is_frozen_bias",
    "leave_center",
    "refuse_centers",
]


def refuse_centers(layers: Iterable[LoraLayer], adapter: str) -> None:
    """Raise a TypeError if the gates of an adapter act about a center."""
    if any(hasattr(layer.lora_B[adapter], "center") for layer in layers):
        raise TypeError(
            "the adapter's gates act about a center, which drawn weights do not use; "
            "remove it first: gauge.center(gate_model, None)"
        )


@torch.no_grad()
def leave_center(layer: LoraLayer, adapter: str, keep: Tensor) -> None:
    """Add the output of removed components at their center to the layer's bias.

    Args:
        layer: The LoRA layer, changed in place; nothing happens without a center.
        adapter: The adapter's name.
        keep: The components that stay, ``r``, bool.
    """
    lora_B: Any = layer.lora_B[adapter]
    if hasattr(lora_B, "center"):
        lora_B.bias += constant(lora_B, ~keep)


def constant(lora_B: nn.Module, gone: Tensor) -> Tensor:
    """``B diag(gone) c``: what the components contribute at their center, ``out``.

    Args:
        lora_B: A ``lora_B`` with a center.
        gone: The removed share of each component, ``r``, bool or in [0, 1].
    """
    center: Any = lora_B.center
    weight: Any = lora_B.weight
    contribution: Tensor = weight.flatten(1) @ (gone.to(center) * center)
    return contribution


def give_bias(layer: LoraLayer, adapter: str) -> None:
    """Give a layer's ``lora_B`` a bias of 0 that is not trained."""
    lora_B: Any = layer.lora_B[adapter]
    # A buffer, since PEFT's set_adapter makes every Parameter of an adapter trainable.
    # torch registers it only after the empty Parameter of that name is deleted.
    del lora_B.bias
    zero = lora_B.weight.detach().new_zeros(len(lora_B.weight))
    lora_B.register_buffer("bias", zero)
    layer.lora_bias[adapter] = True


def hold_constant(layer: LoraLayer, adapter: str) -> None:
    """Leave of a layer its bias alone: A and B become zeros of rank 1, not trained."""
    lora_A: Any = layer.lora_A[adapter]
    lora_B: Any = layer.lora_B[adapter]
    layer.lora_A[adapter] = _Skipped(lora_A.weight)
    layer.lora_B[adapter] = _Constant(lora_B.weight, lora_B.bias)


class _Skipped(nn.Module):
    """Replaces the ``lora_A`` before a `_Constant`, and passes its input through.

    PEFT reads its weight, a row of zeros, for merging and for the precision.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        zeros = torch.zeros_like(weight.detach())
        self.register_buffer("weight", zeros, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x


class _Constant(_Skipped):
    """Replaces a ``lora_B`` of which only the bias is left.

    Its output is the bias, which broadcasts over any input.
    """

    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__(weight)
        self.register_buffer("bias", bias.detach())
        self.trailing = weight.dim() - 2

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.view(-1, *[1] * self.trailing)


def is_frozen_bias(lora_B: nn.Module) -> bool:
    """Whether ``lora_B`` has a bias of `give_bias`, which is a buffer."""
    bias = getattr(lora_B, "bias", None)
    return bias is not None and not isinstance(bias, nn.Parameter)


def is_constant(layer: LoraLayer, adapter: str) -> bool:
    """Whether `hold_constant` was called on the layer."""
    return isinstance(layer.lora_B[adapter], _Constant)


def groups_of(layer: LoraLayer, adapter: str) -> int:
    """The number of groups of a convolution's ``lora_B``; 1 for other layers.

    A grouped convolution ties its ranks to its groups.
    """
    return getattr(layer.lora_B[adapter], "groups", 1)
