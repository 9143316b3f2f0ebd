"""Gaussian gates, of a given or a learned scale."""

import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro.inference.param_store import FreezableModule
from lrvd_pyro.priors.base import positive, sample_site
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["ARD", "Normal"]


class Normal:
    """Gaussian gates: a Gaussian weight on each rank component.

    ``gate_i ~ Normal(0, scale)``, independently. Proper. `RankDiagonal` holds the
    posterior mean of the gate at 1, and ``scale`` is in the same units. If the mean
    were learned without ``weight_prior``, the minimum over it would be that of `ARD`.

    Site: ``gate``, event shape (R,).

    Example::

        GateLoRA(net, prior=Normal(1.0), weight_prior=dist.Normal(0, 1), num_data=N)

    Args:
        scale: The standard deviation of a gate.

    Raises:
        ValueError: If ``scale`` is not positive.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = positive("scale", scale)

    def __call__(self, space: RankSpace) -> Tensor:
        return sample_site("gate", dist.Normal(0 * space.ones(), self.scale))


class ARD(FreezableModule):
    """Gaussian gates whose variances are learned: automatic relevance determination.

    ``gate_i ~ Normal(0, sqrt(gamma_i))``, with gamma learned as part of the model.
    Proper given gamma. At the best gamma, ``1 + alpha``, the KL from N(1, alpha) is
    ``log(1 + 1/alpha) / 2`` nats. That KL is invariant to scale, and falls to 0 as
    1/alpha does.

    Site: ``gate``, event shape (R,). Parameter: ``log_gamma`` (R,), made when the prior
    first sees its rank space. So each model needs an `ARD` of its own.

    Wrong as a density of anything: gamma is fitted to the data. The objective is an
    evidence bound only for gamma fixed beforehand.

    Example::

        model = GateLoRA(net, prior=ARD(), num_data=len(train))

    Source: MacKay (1994); Tipping (2001).
    """

    def forward(self, space: RankSpace) -> Tensor:
        """Draw the site ``gate``, ``R`` (``B x R`` when drawn per example)."""
        if not hasattr(self, "log_gamma"):
            self.log_gamma = nn.Parameter(0 * space.ones())
        scale = torch.exp(0.5 * self.log_gamma)
        return sample_site("gate", dist.Normal(torch.zeros_like(scale), scale))
