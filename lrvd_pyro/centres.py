"""The points about which gates act, and what they leave behind.

About a centre c, rank activations h become ``c + z (h - c)``. The centre is a buffer of
``lora_B``, which the network's device, precision and copies take along. What a removed
component is at its centre depends on no input: it goes into the bias of ``lora_B``, the
``lora_bias`` of PEFT.
"""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

if TYPE_CHECKING:
    from lrvd_pyro.rank_space import RankSpace


def centre_of(space: "RankSpace") -> Tensor | None:
    """What `centre_at` set, (R,), moved and cut along with the components."""
    parts: list[Any] = [layer.lora_B[space.adapter] for layer in space.layers]
    known = [part.centre for part in parts if hasattr(part, "centre")]
    return torch.cat(known) if known else None


def centre_at(space: "RankSpace", centre: Tensor | None) -> None:
    """Let the gates of a space act about a point (R,), or about 0 again if None.

    Every module gets a frozen bias of 0, if it has none.

    Raises:
        ValueError: If the point is not finite or of another shape.
        TypeError: If a layer is DoRA, or the space is for drawn weights.
    """
    if centre is None:
        for layer in space.layers:
            layer.lora_B[space.adapter]._buffers.pop("centre", None)
        return
    if centre.shape != (space.size,) or not centre.isfinite().all():
        raise ValueError(
            f"centre has shape {tuple(centre.shape)}; expected ({space.size},), finite"
        )
    if space.dora or space.sides:
        raise TypeError(
            "a centre needs gates, and a bias in lora_B, which DoRA layers and drawn "
            "weights have none of: use models.GateLoRA on plain LoRA"
        )
    config: Any = space.net.peft_config[space.adapter]
    config.lora_bias = True
    for layer, part in zip(space.layers, space.split(centre).values(), strict=True):
        _set_centre(layer, space.adapter, part)


@torch.no_grad()
def leave_centres(space: "RankSpace", keep: Tensor) -> None:
    """Add what goes, where ``keep`` (R,) is False, at its centre to the biases."""
    for layer, kept in zip(space.layers, space.split(keep).values()):
        lora_B: Any = layer.lora_B[space.adapter]
        if hasattr(lora_B, "centre"):
            lora_B.bias += constant(lora_B, ~kept)


def constant(lora_B: Any, gone: Tensor) -> Tensor:
    """``B diag(gone) c``: what components add at their centres, by the share gone."""
    held: Tensor = gone.to(lora_B.centre) * lora_B.centre
    weight: Tensor = lora_B.weight
    return weight.flatten(1) @ held


def _set_centre(layer: LoraLayer, adapter: str, centre: Tensor) -> None:
    lora_B: Any = layer.lora_B[adapter]
    weight: Tensor = lora_B.weight
    lora_B.register_buffer("centre", centre.detach().to(weight, copy=True))
    if lora_B.bias is None:
        zero = weight.new_zeros(len(weight))
        lora_B.bias = nn.Parameter(zero, requires_grad=False)
        layer.lora_bias[adapter] = True
