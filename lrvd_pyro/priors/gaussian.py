"""Gaussian gates, of a given or a learned scale."""

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro.inference.param_store import FreezableModule
from lrvd_pyro.priors.base import positive, sample_site
from lrvd_pyro.rank_space.space import RankSpace


class Normal:
    """Gates ~ Normal(0, scale): a Gaussian weight on each rank component.

    Proper; ``scale`` is in units of the gate, whose posterior mean `RankDiagonal` holds
    at 1. Were that mean learned, without ``weight_prior``, the minimum over it would be
    `ARD`. Site: ``gate``, event shape (R,).

    Raises:
        ValueError: If ``scale`` is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = positive("scale", scale)

    def __call__(self, space: RankSpace) -> Tensor:
        return sample_site("gate", dist.Normal(0 * space.ones(), self.scale))


class ARD(FreezableModule):
    """Gates ~ Normal(0, sqrt(gamma_i)), with gamma learned as part of the model.

    Automatic relevance determination. Proper given gamma. At the best gamma,
    ``1 + alpha``, the KL from N(1, alpha) is ``log(1 + 1/alpha) / 2`` nats: invariant
    to scale, and falling to 0 as 1/alpha. Site: ``gate``, event shape (R,); parameter
    ``log_gamma`` (R,), made when the prior first sees its rank space.

    Wrong as a density of anything: gamma is fitted to the data, so the objective is an
    evidence bound only for gamma fixed beforehand.

    Source: MacKay (1994); Tipping (2001).
    """

    def forward(self, space: RankSpace) -> Tensor:
        """Draw the site ``gate``."""
        if not hasattr(self, "log_gamma"):
            self.log_gamma = nn.Parameter(0 * space.ones())
        scale = torch.exp(0.5 * self.log_gamma)
        return sample_site("gate", dist.Normal(torch.zeros_like(scale), scale))
