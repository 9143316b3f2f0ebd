"""The points about which gates act, and what they leave behind.

About a centre c, rank activations h become ``c + z (h - c)``. The centre is a buffer of
``lora_B``, which the network's device, precision and copies take along. What a removed
component is at its centre depends on no input: it goes into the bias of ``lora_B``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def set_centres(
    layers: Sequence[LoraLayer], adapter: str, centres: Iterable[Tensor]
) -> None:
    """Give each layer a centre (r,), and a frozen bias of 0 if it has none."""
    for layer, centre in zip(layers, centres, strict=True):
        lora_B: Any = layer.lora_B[adapter]
        weight: Tensor = lora_B.weight
        lora_B.register_buffer("centre", centre.detach().to(weight, copy=True))
        if lora_B.bias is None:
            zero = weight.new_zeros(len(weight))
            lora_B.bias = nn.Parameter(zero, requires_grad=False)
            layer.lora_bias[adapter] = True


def drop_centres(layers: Iterable[LoraLayer], adapter: str) -> None:
    """Let gates act about 0 again."""
    for layer in layers:
        layer.lora_B[adapter]._buffers.pop("centre", None)


@torch.no_grad()
def leave_centres(
    layers: Iterable[LoraLayer], adapter: str, keeps: Iterable[Tensor]
) -> None:
    """Add what goes, where ``keep`` (r,) is False, at its centre to the biases."""
    for layer, keep in zip(layers, keeps):
        lora_B: Any = layer.lora_B[adapter]
        if hasattr(lora_B, "centre"):
            lora_B.bias += constant(lora_B, ~keep)


def constant(lora_B: Any, gone: Tensor) -> Tensor:
    """``B diag(gone) c``: what components add at their centres, by the share gone."""
    held: Tensor = gone.to(lora_B.centre) * lora_B.centre
    weight: Tensor = lora_B.weight
    return weight.flatten(1) @ held
