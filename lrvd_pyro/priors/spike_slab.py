"""Gates with exact zeros and ones."""

import math

import torch
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro.priors.base import positive, sample_site
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["SpikeSlab"]


class SpikeSlab:
    """Gates in [0, 1] with exact zeros and ones: the hard concrete distribution.

    ``gate = clamp(1.2 sigmoid(gate_logit) - 0.1, 0, 1)``. The site ``gate_logit`` is
    logistic with scale ``1 / temperature``. Its location makes a gate differ from 0
    with probability ``inclusion``.

    Proper; a density of ``gate_logit``, so any guide will do. Sites: ``gate_logit``
    (R,); ``gate`` (R,) is deterministic.

    Wrong as a posterior of independent Bernoulli gates, of which it is a relaxation,
    except at low temperature.

    Example::

        model = GateLoRA(net, prior=SpikeSlab(0.5), num_data=len(train))

    Args:
        inclusion: The prior probability that a gate is not 0.
        temperature: The lower, the closer to Bernoulli gates.

    Raises:
        ValueError: If ``inclusion`` is not between 0 and 1, or ``temperature`` is not
            positive.

    Source: Louizos, Welling and Kingma (2018, arXiv 1712.01312).
    """

    # The least logit whose gate is 1: below it the start would shrink the adapter, far
    # above it the clamp lets no gradient through.
    start = {"gate_logit": math.log(11)}

    def __init__(self, inclusion: float = 0.5, temperature: float = 0.5) -> None:
        if not 0 < inclusion < 1:
            raise ValueError(
                f"inclusion={inclusion}; expected the probability that a gate is not "
                f"0, between 0 and 1: SpikeSlab(0.5)"
            )
        self.temperature = positive("temperature", temperature)
        self.inclusion = inclusion

    def __call__(self, space: RankSpace) -> Tensor:
        # 1.2 sigmoid(x) - 0.1 is 0 at x = -log 11 and 1 at x = log 11.
        odds = math.log(self.inclusion / (1 - self.inclusion))
        loc = odds / self.temperature - math.log(11)
        prior = dist.Logistic(loc * space.ones(), 1 / self.temperature)
        logit = sample_site("gate_logit", prior)
        return torch.clamp(1.2 * logit.sigmoid() - 0.1, 0.0, 1.0)
