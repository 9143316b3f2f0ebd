"""Set, read and remove the center about which the gates of a `RankSpace` act."""

import copy
from typing import Any

from torch import Tensor

from lrvd_pyro.rank_space.constant import give_bias, groups_of, is_frozen_bias
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["center_at", "center_of", "check_center"]


def center_of(space: RankSpace) -> dict[str, Tensor]:
    """The center of each module, ``r`` per module; empty where gates act about 0.

    `RankSpace.select` cuts a center along with its components.
    """
    sides = {n: m.lora_B[space.adapter] for n, m in zip(space.modules, space.layers)}
    return {n: side.center for n, side in sides.items() if hasattr(side, "center")}  # type: ignore[misc]


def center_at(space: RankSpace, center: Tensor | None) -> None:
    """Let the gates of a space act about a center: ``h`` becomes ``c + z (h - c)``.

    Every module without a bias gets a bias of 0. The call with None takes these biases
    away if all of them are still 0.

    Args:
        space: The rank components; their layers are changed in place.
        center: The center ``c`` of the rank activations, ``R``; None means 0.

    Raises:
        ValueError: If the center is not finite, or has another shape.
        TypeError: If a layer is DoRA or a grouped convolution, or the space is for
            drawn weights.
    """
    if center is None:
        _forget(space)
        return
    check_center(space, center)
    for layer, part in zip(space.layers, space.split(center).values(), strict=True):
        lora_B: Any = layer.lora_B[space.adapter]
        lora_B.register_buffer("center", part.detach().to(lora_B.weight, copy=True))
        if lora_B.bias is None:
            give_bias(layer, space.adapter)
    _tell_peft(space, lora_bias=True)


def check_center(space: RankSpace, center: Tensor) -> None:
    """Raise the errors of `center_at`, without changing anything."""
    exact = center.to(space.weights("lora_B")[0].dtype)
    if center.shape != (space.size,) or not exact.isfinite().all():
        raise ValueError(
            f"the center has shape {tuple(center.shape)} and entries up to "
            f"{float(center.abs().max())}; expected ({space.size},), finite in "
            f"{exact.dtype}"
        )
    grouped = [m for m in space.layers if groups_of(m, space.adapter) > 1]
    if space.dora or space.sides or grouped:
        raise TypeError(
            "a center needs a gate for each column of lora_B, and a bias; grouped "
            "convolutions and drawn weights lack such gates, DoRA layers lack the "
            "bias: use models.GateLoRA on other layers, or centered=False"
        )


def _forget(space: RankSpace) -> None:
    """Let gates act about 0 again.

    Also remove the biases we added, if all are zero and no layer is bias-only.
    """
    sides: list[Any] = [layer.lora_B[space.adapter] for layer in space.layers]
    for lora_B in sides:
        if hasattr(lora_B, "center"):
            del lora_B.center
    added = [side for side in sides if is_frozen_bias(side)]
    if not added or space.constants or any(bool(side.bias.any()) for side in added):
        return
    for layer, lora_B in zip(space.layers, sides, strict=True):
        del lora_B.bias
        lora_B.register_parameter("bias", None)
        layer.lora_bias[space.adapter] = False
    _tell_peft(space, lora_bias=False)


def _tell_peft(space: RankSpace, *, lora_bias: bool) -> None:
    """Record ``lora_bias`` in the config from which PEFT writes and loads its files."""
    # on a copy, since the user may pass the same LoraConfig to another network
    config: Any = copy.copy(space.net.peft_config[space.adapter])
    config.lora_bias = lora_bias
    space.net.peft_config[space.adapter] = config
