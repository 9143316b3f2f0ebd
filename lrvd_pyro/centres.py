"""The points about which gates act, and what they leave behind.

About a centre c, rank activations h become ``c + z (h - c)``. What a removed component
is at its centre depends on no input: it goes into the bias of ``lora_B``, the
``lora_bias`` of PEFT. Centre and bias are buffers of ``lora_B``: the network's device,
precision, copies and state take them along, and nobody trains them.
"""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

if TYPE_CHECKING:
    from lrvd_pyro.rank_space import RankSpace


def centre_of(space: "RankSpace") -> dict[str, Tensor]:
    """What `centre_at` set, r per module, cut along with the components; or nothing."""
    parts = {n: m.lora_B[space.adapter] for n, m in zip(space.modules, space.layers)}
    return {n: part.centre for n, part in parts.items() if hasattr(part, "centre")}  # type: ignore[misc]


def centre_at(space: "RankSpace", centre: Tensor | None) -> None:
    """Let the gates of a space act about a point (R,), or about 0 again if None.

    Every module gets a bias of 0, if it has none; while it is 0, None takes it away.

    Raises:
        ValueError: If the point is not finite, or of another shape.
        TypeError: If a layer is DoRA or a grouped convolution, or the space is for
            drawn weights.
    """
    if centre is None:
        _forget(space)
        return
    exact = centre.to(space.weights("lora_B")[0].dtype)
    if centre.shape != (space.size,) or not exact.isfinite().all():
        raise ValueError(
            f"the centre has shape {tuple(centre.shape)} and entries up to "
            f"{float(centre.abs().max())}; expected ({space.size},), finite in "
            f"{exact.dtype}"
        )
    grouped = [m for m in space.layers if _groups(m, space.adapter) > 1]
    if space.dora or space.sides or grouped:
        raise TypeError(
            "a centre needs a gate for each column of lora_B, which grouped "
            "convolutions and drawn weights have not, and a bias, which DoRA layers "
            "have not: use models.GateLoRA on other layers, or centred=False"
        )
    for layer, part in zip(space.layers, space.split(centre).values(), strict=True):
        lora_B: Any = layer.lora_B[space.adapter]
        lora_B.register_buffer("centre", part.detach().to(lora_B.weight, copy=True))
        if lora_B.bias is None:
            give_bias(layer, space.adapter)


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


def give_bias(layer: LoraLayer, adapter: str) -> None:
    """A bias of 0 that does not train."""
    lora_B: Any = layer.lora_B[adapter]
    zero = lora_B.weight.detach().new_zeros(len(lora_B.weight))
    _as_buffer(lora_B, "bias", zero)
    layer.lora_bias[adapter] = True


def hold_constant(layer: LoraLayer, adapter: str) -> None:
    """Let a bias alone be left of a layer of rank 1: no parameter, A and B zeros.

    PEFT's own layers compute with A and B, and know no rank 0.
    """
    sides: Any = layer.lora_A[adapter], layer.lora_B[adapter]
    for module in sides:
        zeros = torch.zeros_like(module.weight.detach())
        _as_buffer(module, "weight", zeros, persistent=False)
        module._buffers.pop("centre", None)
    _as_buffer(sides[1], "bias", sides[1].bias.detach())


def is_constant(layer: LoraLayer, adapter: str) -> bool:
    """Whether `hold_constant` was called on the layer."""
    lora_A: Any = layer.lora_A[adapter]
    return "weight" in lora_A._buffers


def _as_buffer(
    module: nn.Module, name: str, value: Tensor, *, persistent: bool = True
) -> None:
    module._parameters.pop(name, None)
    module._buffers.pop(name, None)
    module.register_buffer(name, value, persistent)


def _forget(space: "RankSpace") -> None:
    """Gates act about 0 again; biases of ours that are still 0 go."""
    for layer in space.layers:
        lora_B: Any = layer.lora_B[space.adapter]
        lora_B._buffers.pop("centre", None)
        if "bias" in lora_B._buffers and not lora_B.bias.any():
            del lora_B.bias
            lora_B.register_parameter("bias", None)
            layer.lora_bias[space.adapter] = False


def _groups(layer: LoraLayer, adapter: str) -> int:
    return getattr(layer.lora_B[adapter], "groups", 1)
