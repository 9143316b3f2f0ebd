"""How often latents are drawn: per example of a batch, or per batch."""

import warnings
from typing import Literal, get_args

from lrvd_pyro._compat.pyro import innermost
from lrvd_pyro.batches import Batch
from lrvd_pyro.inference.programs import Program

__all__ = ["Noise", "check_noise", "draws_per_example"]

Noise = Literal["auto", "example", "batch"]


def check_noise(noise: str) -> None:
    """Raise a ValueError unless ``noise`` is one of the three."""
    if noise not in get_args(Noise):
        raise ValueError(f'noise={noise!r}; expected "auto", "example" or "batch"')


def draws_per_example(
    noise: Noise, program: Program, batch: Batch, warned: set[str]
) -> bool:
    """Whether latents are drawn for each example of this batch.

    Args:
        noise: The user's choice. Under "auto" the program says whether it takes a draw
            per example; under "example" the program itself refuses what it cannot take.
        program: A model; Pyro's handlers may stand around it.
        batch: The batch that it is called with.
        warned: Reasons that the user knows; a new one is added, with a warning.
    """
    look = getattr(innermost(program), "mixed_rows", None)
    reason = str(look(batch)) if look and noise == "auto" else ""
    if reason and reason not in warned:
        warned.add(reason)
        remedy = 'draws once per batch instead, as noise="batch" does in silence'
        warnings.warn(f"{reason}; RankELBO {remedy}", stacklevel=2)
    return noise != "batch" and not reason
