"""What a prior is, and what those of this package share."""

import math
from collections.abc import Callable
from numbers import Real

import pyro
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro.rank_space.space import RankSpace

Prior = Callable[[RankSpace], Tensor]


def sample_site(site: str, prior: dist.TorchDistribution) -> Tensor:
    value: Tensor = pyro.sample(site, prior.to_event(1))
    return value


def positive(name: str, value: float) -> float:
    if not (isinstance(value, Real) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r}; expected a positive number")
    return float(value)
