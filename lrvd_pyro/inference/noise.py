"""How often latents are drawn: per example of a batch, or per batch."""

import inspect
from typing import Literal, get_args

from lrvd_pyro.batches import Batch
from lrvd_pyro.inference.programs import Program

__all__ = ["Noise", "check_noise", "mixed_rows"]

Noise = Literal["auto", "example", "batch"]


def check_noise(noise: str) -> None:
    """Raise a ValueError unless ``noise`` is one of the three."""
    if noise not in get_args(Noise):
        raise ValueError(f'noise={noise!r}; expected "auto", "example" or "batch"')


def mixed_rows(program: Program, batch: Batch) -> str:
    """Why a program takes no draw per example; empty if it does, or does not say.

    Args:
        program: A model; Pyro's handlers may stand around it.
        batch: The batch that it is called with.
    """
    look = getattr(inspect.unwrap(program), "mixed_rows", None)
    return str(look(batch)) if look else ""
