"""The noise at which the quadratic objective is least, rank by rank."""

import math

import torch
from torch import Tensor

from lrvd_pyro.distributions.log_uniform import dawson
from lrvd_pyro.priors.base import Prior
from lrvd_pyro.priors.gaussian import ARD, Normal
from lrvd_pyro.priors.log_uniform import LogUniform

__all__ = ["optimal_alpha"]


def optimal_alpha(fisher: Tensor, prior: Prior) -> Tensor:
    """The alpha of each rank that minimizes ``F alpha / 2 + KL(N(1, alpha) || prior)``.

    Under `priors.LogUniform` of multiplicity w, ``alpha = 1 / (2 u^2)`` where u solves
    ``F = 4 w u^3 D(u)`` and D is Dawson's function. Under `priors.Normal` of scale s,
    ``alpha = 1 / (F + 1/s^2)``. Under `priors.ARD`, with gamma at its best value
    ``1 + alpha``, ``alpha = (sqrt(1 + 4/F) - 1) / 2``.

    Args:
        fisher: F, the exact Fisher information of each gate, over the whole data set,
            of any shape. It must belong to the gauge that the gates will have:
            `Gramians.gate_fisher`, taken again after `balance`. Do not pass ``t_i^2``,
            which neglects what tokens share.
        prior: One of these three.

    Returns:
        alpha, of the shape of ``fisher``, in float64. It is infinite where F is 0 and
        the prior does not bound it.

    Raises:
        TypeError: If the prior is another one.
        ValueError: If ``fisher`` is negative or not finite.

    Wrong beyond the quadratic regime: alpha is then so large that the likelihood at
    ``1 +- sqrt(alpha)`` is far from its expansion at 1.

    Source: derived here.

    >>> optimal_alpha(torch.tensor([0.0, 3.0]), Normal(1.0))
    tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    if not bool((fisher >= 0).all() and fisher.isfinite().all()):
        raise ValueError(
            f"the Fisher information lies between {float(fisher.min())} and "
            f"{float(fisher.max())}; expected finite values from 0 on: "
            f"gramians(model, batches).gate_fisher"
        )
    information = fisher.double()
    if isinstance(prior, Normal):
        return 1 / (information + prior.scale**-2)
    if isinstance(prior, ARD):
        # The formula above, free of the difference that cancels where F is large.
        return 2 / (information + (information * (information + 4)).sqrt())
    if isinstance(prior, LogUniform):
        return _log_uniform_alpha(information / (4 * prior.multiplicity))
    raise TypeError(
        f"prior is a {type(prior).__name__}, under which alpha has no closed form; "
        f"freeze A and B and fit the guide: SVI(model, RankDiagonal(model, "
        f"learn_mean=True), ...)"
    )


def _log_uniform_alpha(target: Tensor) -> Tensor:
    """``1 / (2 u^2)`` where ``u^3 D(u)`` equals the target, by bisection in log u."""
    # u^3 D(u) rises in u. It lies below u^4 and, beyond u = 2, above u^2 / 2: these two
    # enclose log u. Sixty halvings reach the last bit.
    low = 0.25 * target.log() - math.log(2)
    high = torch.maximum(0.25 * target.log(), 0.5 * (2 * target).log()) + math.log(2)
    for _ in range(60):
        middle = (low + high) / 2
        u = middle.exp()
        above = u**3 * dawson(u) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * torch.exp(-(low + high))
