"""Gates with exact zeros and ones."""

import math

import torch
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro.priors.base import positive, sample_site
from lrvd_pyro.rank_space.space import RankSpace


class SpikeSlab:
    """Gates in [0, 1] with exact zeros and ones: the hard concrete distribution.

    ``gate = clamp(1.2 sigmoid(gate_logit) - 0.1, 0, 1)``, ``gate_logit`` logistic with
    scale ``1 / temperature`` and the location at which a gate is not 0 with
    probability ``inclusion``. A relaxation of independent Bernoulli gates, whose
    posterior it approaches at low temperature only.

    Proper; a density of ``gate_logit``, so any guide will do. Sites: ``gate_logit``
    (R,); ``gate`` (R,) is deterministic.

    Raises:
        ValueError: If ``inclusion`` is not between 0 and 1, or ``temperature`` is not
            positive.

    Source: Louizos, Welling and Kingma (2018, arXiv 1712.01312).
    """

    start = {"gate_logit": math.log(11)}  # the least logit whose gate is 1

    def __init__(self, inclusion: float = 0.5, temperature: float = 0.5) -> None:
        if not 0 < inclusion < 1:
            raise ValueError(
                f"inclusion={inclusion}; expected the probability that a gate is not "
                f"0, between 0 and 1: SpikeSlab(0.5)"
            )
        self.temperature = positive("temperature", temperature)
        self.inclusion = inclusion

    def __call__(self, space: RankSpace) -> Tensor:
        odds = math.log(self.inclusion / (1 - self.inclusion))
        loc = odds / self.temperature - math.log(11)
        prior = dist.Logistic(loc * space.ones(), 1 / self.temperature)
        logit = sample_site("gate_logit", prior)
        return torch.clamp(1.2 * logit.sigmoid() - 0.1, 0.0, 1.0)
