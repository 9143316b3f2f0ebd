"""What a prior is, and what the priors of this package share."""

import math
from collections.abc import Callable
from numbers import Real

import pyro
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["Prior", "positive", "sample_site"]

# The contract is in the docstring of lrvd_pyro.priors; check_prior enforces it.
Prior = Callable[[RankSpace], Tensor]


def sample_site(site: str, prior: dist.TorchDistribution) -> Tensor:
    """Draw a vector as one site, its components independent."""
    value: Tensor = pyro.sample(site, prior.to_event(1))
    return value


def positive(name: str, value: float) -> float:
    """The number, if it is positive and finite.

    Raises:
        ValueError: With the name of the argument.
    """
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r}; expected a positive number")
    return float(value)
