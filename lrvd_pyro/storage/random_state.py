"""The state of every global random number generator, as JSON and tensors."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrvd_pyro.storage.schema import (
    Misfit,
    anything,
    list_of,
    number,
    optional,
    record,
    text,
)

__all__ = ["check_random_state", "random_state", "set_random_state"]


_REFUSALS = TypeError, ValueError, LookupError, ArithmeticError, RuntimeError, Misfit


def random_state() -> dict[str, Any]:
    """Read the generators of torch (CPU, and CUDA where used), NumPy and Python."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    # Reading CUDA's generators would start CUDA in a process that does not use it.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` read; CUDA devices that are not here are left out."""
    torch.set_rng_state(state["torch"])
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(saved, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


def check_random_state(state: Any, place: str) -> None:
    """Accept what `set_random_state` can restore; generators of their own try it."""
    kinds = {"torch": anything, "cuda": list_of(_bytes), "numpy": list_of(anything)}
    record(kinds | {"python": list_of(anything)})(state, place)
    tries: dict[str, Callable[[Any], object]] = {
        "torch": torch.Generator().set_state,
        "numpy": _try_numpy,
        "python": _try_python,
    }
    for name, take in tries.items():
        try:
            take(state[name])
        except _REFUSALS as error:
            expected = f"the state of a generator ({error})"
            raise Misfit(f"{place}[{name!r}]", state[name], expected) from error


def _try_numpy(state: Any) -> None:
    kind, keys, position, has_gauss, cached = state
    text(kind, "kind")
    number(cached, "cached")
    # NumPy reads at this place without a look at it.
    if type(position) is not int or not 0 <= position <= 624 or has_gauss not in (0, 1):
        raise ValueError(f"a position of {position!r}")
    np.random.RandomState().set_state((kind, keys, position, has_gauss, cached))


def _try_python(state: Any) -> None:
    random.Random().setstate(state)
    optional(number)(state[2], "the next of gauss()")  # which takes any object


def _bytes(value: object, place: str) -> None:
    """Accept the state of a CUDA generator: a seed and an offset."""
    if not (
        isinstance(value, Tensor) and value.dtype == torch.uint8 and len(value) == 16
    ):
        raise Misfit(place, value, "a tensor of 16 bytes")
