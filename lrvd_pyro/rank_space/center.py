"""The point about which the gates of a `RankSpace` act."""

import copy
from typing import Any

from torch import Tensor

from lrvd_pyro.rank_space.constant import give_bias, groups_of, is_frozen_bias
from lrvd_pyro.rank_space.space import RankSpace


def center_of(space: RankSpace) -> dict[str, Tensor]:
    """What `center_at` set, r per module, cut along with the components; or nothing."""
    parts = {n: m.lora_B[space.adapter] for n, m in zip(space.modules, space.layers)}
    return {n: part.center for n, part in parts.items() if hasattr(part, "center")}  # type: ignore[misc]


def center_at(space: RankSpace, center: Tensor | None) -> None:
    """Let the gates of a space act about a point (R,), or about 0 again if None.

    Every module gets a bias of 0, if it has none; while it is 0, None takes it away.

    Raises:
        ValueError: If the point is not finite, or of another shape.
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
    """Raise as `center_at` does."""
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
            "a center needs a gate for each column of lora_B, which grouped "
            "convolutions and drawn weights have not, and a bias, which DoRA layers "
            "have not: use models.GateLoRA on other layers, or centered=False"
        )


def _forget(space: RankSpace) -> None:
    """Gates act about 0 again; biases of ours go, if nothing was left in any."""
    sides: list[Any] = [layer.lora_B[space.adapter] for layer in space.layers]
    for lora_B in sides:
        if hasattr(lora_B, "center"):
            del lora_B.center
    ours = [b for b in sides if is_frozen_bias(b)]
    if not ours or space.constants or any(bool(b.bias.any()) for b in ours):
        return
    for layer, lora_B in zip(space.layers, sides, strict=True):
        del lora_B.bias
        lora_B.register_parameter("bias", None)
        layer.lora_bias[space.adapter] = False
    _tell_peft(space, lora_bias=False)


def _tell_peft(space: RankSpace, *, lora_bias: bool) -> None:
    """Say in the network's config what files of PEFT's own then hold.

    In a copy: whoever made the config may use it again.
    """
    config: Any = copy.copy(space.net.peft_config[space.adapter])
    config.lora_bias = lora_bias
    space.net.peft_config[space.adapter] = config
