"""The states of checkpoints that earlier versions wrote, in the present form."""

from pathlib import Path
from typing import Any

__all__ = ["brought_up"]


def brought_up(path: Path, state: dict[str, Any], version: int) -> dict[str, Any]:
    """Give the state of a checkpoint the names and entries of the present version.

    Args:
        path: The checkpoint, for the message.
        state: What it holds.
        version: The version of its format.

    Raises:
        ValueError: If an earlier state has not the entries of its version.
    """
    try:
        state = _from_version_1(state) if version == 1 else state
        state = _from_version_2(state) if version < 3 else state
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} has no state of version {version}: {error!r}; resume an earlier "
            f"checkpoint"
        ) from error
    # Guides before that had no other scale.
    return {"linearized_scale": 1.0} | state


def _from_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """There, centers and the gradients of a BalanceSchedule had other names."""

    def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
        ends = ".centre", ".center"
        return {
            n.removesuffix(ends[0]) + ends[1] if n.endswith(ends[0]) else n: t
            for n, t in tensors.items()
        }

    schedules = [
        {"gradients" if k == "scores" else k: v for k, v in each.items()}
        for each in state["schedule"]
    ]
    named = {name: renamed(state[name]) for name in ("layout", "tensors")}
    return state | named | {"schedule": schedules}


def _from_version_2(state: dict[str, Any]) -> dict[str, Any]:
    """There, the optimizer left out parameters without moments, and torch's version."""
    saved = state["optimizer"]
    names = [name for group in saved["groups"] for name in group["params"]]
    moments = dict.fromkeys(names, {}) | saved["moments"]
    return state | {"optimizer": saved | {"moments": moments, "torch": ""}}
