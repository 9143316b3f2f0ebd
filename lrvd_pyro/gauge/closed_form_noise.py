"""The noise that the quadratic objective wants, rank by rank."""

import math

import torch
from torch import Tensor

from lrvd_pyro.distributions.log_uniform import dawson
from lrvd_pyro.priors.base import Prior
from lrvd_pyro.priors.gaussian import ARD, Normal
from lrvd_pyro.priors.log_uniform import LogUniform


def optimal_alpha(fisher: Tensor, prior: Prior) -> Tensor:
    """The alpha of each rank that minimizes ``F alpha / 2 + KL(N(1, alpha) || prior)``.

    `priors.LogUniform` of multiplicity w: ``alpha = 1 / (2 u^2)`` where u solves
    ``F = 4 w u^3 D(u)``, D being Dawson's function. `priors.Normal` of scale s:
    ``1 / (F + 1/s^2)``. `priors.ARD`, gamma at its best value ``1 + alpha``:
    ``(sqrt(1 + 4/F) - 1) / 2``.

    Args:
        fisher: The exact Fisher information of each gate, over the whole data set and
            in the gauge that the gates will have: `Gramians.gate_fisher`, taken again
            after `balance`. Not ``t_i^2``, which neglects what tokens share.
        prior: One of these three.

    Returns:
        alpha, of the shape of ``fisher``, float64; infinite where F is 0 and nothing
        bounds it.

    Raises:
        TypeError: If the prior is another.
        ValueError: If ``fisher`` is negative or not finite.

    Wrong beyond the quadratic regime, where alpha is so large that the likelihood at
    ``1 +- sqrt(alpha)`` is far from its expansion at 1.

    >>> optimal_alpha(torch.tensor([0.0, 3.0]), Normal(1.0))
    tensor([1.0000, 0.2500], dtype=torch.float64)
    """
    if not bool((fisher >= 0).all() and fisher.isfinite().all()):
        raise ValueError(
            f"the Fisher information lies between {float(fisher.min())} and "
            f"{float(fisher.max())}; expected finite values from 0: "
            f"gramians(model, batches).gate_fisher"
        )
    information = fisher.double()
    if isinstance(prior, Normal):
        return 1 / (information + prior.scale**-2)
    if isinstance(prior, ARD):
        return 2 / (information + (information * (information + 4)).sqrt())
    if isinstance(prior, LogUniform):
        return _log_uniform_alpha(information / (4 * prior.multiplicity))
    raise TypeError(
        f"prior is a {type(prior).__name__}, under which alpha has no closed form; "
        f"freeze A and B and fit the guide: SVI(model, RankDiagonal(model, "
        f"learn_mean=True), ...)"
    )


def _log_uniform_alpha(target: Tensor) -> Tensor:
    """``1 / (2 u^2)`` where ``u^3 D(u)`` is the target: bisection in log u.

    ``u^3 D(u)`` rises in u, below u^4 and, beyond u = 2, above u^2 / 2.
    """
    low = 0.25 * target.log() - math.log(2)
    high = torch.maximum(0.25 * target.log(), 0.5 * (2 * target).log()) + math.log(2)
    for _ in range(60):
        middle = (low + high) / 2
        u = middle.exp()
        above = u**3 * dawson(u) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return 0.5 * torch.exp(-(low + high))
