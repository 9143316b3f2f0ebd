"""Add a prior: a function from the RankSpace to the gate. Here: Laplace gates."""

import pyro
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro import RankSpace


def laplace(space: RankSpace) -> Tensor:
    """Gates ~ Laplace(0, 1): the density peaks where a rank is off.

    The site has one event dimension, so that it can be drawn once per example. A prior
    with parameters is a PyroModule instead, such as `lrvd_pyro.priors.ARD`.
    """
    density = dist.Laplace(0 * space.ones(), 1.0)
    gate: Tensor = pyro.sample("gate", density.to_event(1))
    return gate
