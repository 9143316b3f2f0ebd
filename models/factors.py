"""What a draw amounts to, and what its components are called."""

from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Factors", "SiteLabels"]

# The name of a dimension, and the coordinates along it by name.
SiteLabels = tuple[str, dict[str, list[Any]]]


class Factors(NamedTuple):
    """What a LoRA module computes by: ``scaling * lora_B diag(gate) lora_A``.

    Attributes:
        lora_A: ``r x in``, or as the layer has it.
        lora_B: ``out x r``, or as the layer has it.
        gate: ``r``.
    """

    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor
