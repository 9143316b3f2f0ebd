"""The points about which gates act, and what they leave behind.

About a centre c, rank activations h become ``c + z (h - c)``. What a removed component
is at its centre depends on no input: it goes into the bias of ``lora_B``, the
``lora_bias`` of PEFT. Centre and bias are buffers of ``lora_B``: the network's device,
precision, copies and state take them along, and nobody trains them. Where nothing but
the bias is left of a layer, `Skipped` and `Constant` stand for its A and B.
"""

import copy
from collections.abc import Iterable
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
    check_centre(space, centre)
    for layer, part in zip(space.layers, space.split(centre).values(), strict=True):
        lora_B: Any = layer.lora_B[space.adapter]
        lora_B.register_buffer("centre", part.detach().to(lora_B.weight, copy=True))
        if lora_B.bias is None:
            give_bias(layer, space.adapter)
    _tell_peft(space, lora_bias=True)


def check_centre(space: "RankSpace", centre: Tensor) -> None:
    """Raise as `centre_at` does."""
    exact = centre.to(space.weights("lora_B")[0].dtype)
    if centre.shape != (space.size,) or not exact.isfinite().all():
        raise ValueError(
            f"the centre has shape {tuple(centre.shape)} and entries up to "
            f"{float(centre.abs().max())}; expected ({space.size},), finite in "
            f"{exact.dtype}"
        )
    grouped = [m for m in space.layers if groups_of(m, space.adapter) > 1]
    if space.dora or space.sides or grouped:
        raise TypeError(
            "a centre needs a gate for each column of lora_B, which grouped "
            "convolutions and drawn weights have not, and a bias, which DoRA layers "
            "have not: use models.GateLoRA on other layers, or centred=False"
        )


def refuse_centres(layers: Iterable[LoraLayer], adapter: str) -> None:
    """Raise a TypeError if the gates of an adapter act about a centre."""
    if any(hasattr(layer.lora_B[adapter], "centre") for layer in layers):
        raise TypeError(
            "the adapter's gates act about a centre, which drawn weights know nothing "
            "of; take it away first: gauge.centre(gate_model, None)"
        )


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


def is_constant(layer: LoraLayer, adapter: str) -> bool:
    """Whether `hold_constant` was called on the layer."""
    return isinstance(layer.lora_B[adapter], Constant)


def _forget(space: "RankSpace") -> None:
    """Gates act about 0 again; biases of ours go, if nothing was left in any."""
    sides: list[Any] = [layer.lora_B[space.adapter] for layer in space.layers]
    for lora_B in sides:
        lora_B._buffers.pop("centre", None)
    ours = [b for b in sides if "bias" in b._buffers]
    if not ours or space.constants or any(bool(b.bias.any()) for b in ours):
        return
    for layer, lora_B in zip(space.layers, sides, strict=True):
        del lora_B.bias
        lora_B.register_parameter("bias", None)
        layer.lora_bias[space.adapter] = False
    _tell_peft(space, lora_bias=False)


def _tell_peft(space: "RankSpace", *, lora_bias: bool) -> None:
    """Say in the network's config what files of PEFT's own then hold.

    In a copy: whoever made the config may use it again.
    """
    config: Any = copy.copy(space.net.peft_config[space.adapter])
    config.lora_bias = lora_bias
    space.net.peft_config[space.adapter] = config


def groups_of(layer: LoraLayer, adapter: str) -> int:
    """The groups of a convolution, to which its ranks are tied; 1 of other layers."""
    return getattr(layer.lora_B[adapter], "groups", 1)
