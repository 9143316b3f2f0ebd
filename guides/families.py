"""The one-dimensional families of the rank-wise diagonal guide.

A family has the members of `RealNoise`. A new one joins `Noise`, and `family_of`
chooses it by the site's prior.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Distribution

from lrvd_pyro.distributions import TruncatedLogNormal, TruncatedLogUniform

__all__ = ["Noise", "RealNoise", "family_of", "walled"]


@dataclass(frozen=True)
class RealNoise:
    """``Normal(loc, v)`` on a real site; log v stays within [-10, 8]."""

    size: int
    limits: ClassVar = (-10.0, 8.0)

    def to_loc(self, mean: Tensor) -> Tensor:
        """The location at which the site has a mean."""
        return mean

    def start_log_variance(self, log_alpha: float, mean: Tensor) -> Tensor:
        """The log variance at which ``v / mean^2`` is alpha."""
        return log_alpha + 2 * mean.abs().log()

    def posterior(self, loc: Tensor, log_variance: Tensor) -> dist.TorchDistribution:
        """The distribution of the site's components."""
        scale = torch.exp(0.5 * walled(log_variance, *self.limits))
        return dist.Normal(loc.to(scale.dtype), scale, validate_args=False)

    def select(self, index: Tensor) -> "RealNoise":
        """The family of the components that stay."""
        return replace(self, size=len(index))


@dataclass(frozen=True)
class _PositiveNoise:
    """``LogNormal(loc - v/2, v)``, of mean ``exp(loc)``; log v within [-10, 2].

    With bounds (low, high) of log z the density is truncated to them. Truncation moves
    the mean where the bounds cut off mass.
    """

    size: int
    bounds: tuple[Tensor, Tensor] | None = None

    def to_loc(self, mean: Tensor) -> Tensor:
        """The location at which the site has a mean."""
        return mean.log()

    def start_log_variance(self, log_alpha: float, mean: Tensor) -> Tensor:
        """The log variance at which ``exp(v) - 1`` is alpha."""
        return torch.full_like(mean, math.log(math.log1p(math.exp(log_alpha))))

    def posterior(self, loc: Tensor, log_variance: Tensor) -> dist.TorchDistribution:
        """The distribution of the site's components."""
        variance = torch.exp(walled(log_variance, -10.0, 2.0))
        # Less v/2, so that the mean of the site does not move with its noise.
        loc, scale = loc.to(variance.dtype) - variance / 2, variance.sqrt()
        if self.bounds is None:
            return dist.LogNormal(loc, scale, validate_args=False)
        low, high = (bound.to(loc.device) for bound in self.bounds)
        return TruncatedLogNormal(loc, scale, low, high, validate_args=False)

    def select(self, index: Tensor) -> "_PositiveNoise":
        """The family of the components that stay."""
        if self.bounds is None:
            return replace(self, size=len(index))
        index = index.to(self.bounds[0].device)
        low, high = (bound.expand(self.size)[index] for bound in self.bounds)
        return replace(self, size=len(index), bounds=(low, high))


Noise = RealNoise | _PositiveNoise


def family_of(name: str, prior: Distribution) -> Noise:
    """The family for a latent site with one event dimension and this prior.

    Raises:
        TypeError: If the site is discrete, or neither real nor positive.
    """
    (size,) = prior.event_shape
    element: Any = getattr(prior, "base_dist", prior)
    support: Any = prior.support
    support = getattr(support, "base_constraint", support)
    if isinstance(element, TruncatedLogUniform):
        return _PositiveNoise(size, (element.low, element.high))
    if support is constraints.real:
        return RealNoise(size)
    if support in (constraints.positive, constraints.nonnegative):
        return _PositiveNoise(size)
    if support.is_discrete:
        raise TypeError(
            f"the latent site {name!r} is discrete ({type(element).__name__}), and no "
            f"gradient leads through its draws; relax it, "
            f"pyro.distributions.RelaxedBernoulli with AutoNormal(model), or take "
            f"priors.SpikeSlab(), which has exact zeros"
        )
    raise TypeError(
        f"the latent site {name!r} has the support {support}; RankDiagonal guides real "
        f"and positive sites, others take pyro.infer.autoguide.AutoNormal(model)"
    )


class _Walled(torch.autograd.Function):
    # A plain clamp has gradient 0 beyond its bounds: what has once crossed them stays.
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.low, ctx.high = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        # Optimizers step against the gradient: at the lower bound a positive one leads
        # out.
        outward = ((x <= ctx.low) & (grad > 0)) | ((x >= ctx.high) & (grad < 0))
        return grad.masked_fill(outward, 0.0), None, None


def walled(x: Tensor, low: float, high: float) -> Tensor:
    """``x`` clamped; a gradient step may lead back from a bound, but not beyond it."""
    result: Tensor = _Walled.apply(x, low, high)  # type: ignore[no-untyped-call]
    return result
