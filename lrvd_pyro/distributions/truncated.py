"""Positive distributions on ``[e^low, e^high]``: log-uniform and log-normal."""

import math
from abc import abstractmethod
from typing import Any, cast

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all, clamp_probs
from torch.special import erfcx, ndtr, ndtri


class _ExpOnInterval(TorchDistribution):
    """The law of ``exp(x)``, x in [low, high]; a subclass says how x is distributed."""

    has_rsample = True
    low: Tensor
    high: Tensor

    def __init__(self, validate_args: bool | None, **parameters: Tensor | float):
        values = broadcast_all(*parameters.values())
        for name, value in zip(parameters, values):
            setattr(self, name, value)
        super().__init__(self.low.shape, validate_args=validate_args)
        width = self.high - self.low
        if self._validate_args and not ((width > 0) & width.isfinite()).all():
            raise ValueError(
                f"{type(self).__name__} got low={self.low} and high={self.high}; "
                f"expected finite low < high, both in log units: the support is "
                f"[exp(low), exp(high)]"
            )

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_ExpOnInterval":
        new = self._get_checked_instance(type(self), _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(shape))
        TorchDistribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return cast(_ExpOnInterval, new)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.interval(self.low.exp(), self.high.exp())

    @property
    def mean(self) -> Tensor:
        return self._log_moment(1).exp().to(self.low.dtype)

    @property
    def variance(self) -> Tensor:
        first, second = self._log_moment(1), self._log_moment(2)
        variance = (2 * first).exp() * (second - 2 * first).clamp(min=0).expm1()
        return variance.to(self.low.dtype)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """`icdf` of uniform draws: ``sample_shape x batch_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.low.dtype, device=self.low.device)
        return self.icdf(clamp_probs(uniform))

    def icdf(self, value: Tensor) -> Tensor:
        """The quantiles of probabilities in (0, 1), differentiable in all arguments."""
        z = self._log_icdf(value).exp()
        return z.clamp(self.low.exp(), self.high.exp())

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats; minus infinity off the support."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.log()
        log_prob = self._log_density(x) - x
        return torch.where(self.support.check(value), log_prob, -math.inf)

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """Of ``x = log z`` in [low, high], in nats; broadcasts with x."""

    @abstractmethod
    def _log_icdf(self, u: Tensor) -> Tensor:
        """The quantiles of ``x = log z``."""

    @abstractmethod
    def _log_moment(self, n: int) -> Tensor:
        """``log E z^n``, in float64."""


class TruncatedLogUniform(_ExpOnInterval):
    """The proper log-uniform density ``p(z) = 1 / (z (high - low))``.

    Its log is uniform on [low, high], so every order of magnitude in between is
    equally likely. The KL of a `TruncatedLogNormal` from it is closed, and infinite
    where that reaches beyond [low, high].

    Source: Neklyudov, Molchanov, Ashukha and Vetrov (2017, arXiv 1705.07283).

    Args:
        low: Log of the smallest value; a number or ``batch_shape``.
        high: Log of the largest value; a number or ``batch_shape``.
        validate_args: As in Pyro; None follows ``pyro.enable_validation``.

    Raises:
        ValueError: Unless low < high, both finite.

    >>> TruncatedLogUniform(-20.0, 0.0).mean
    tensor(0.0500)
    """

    arg_constraints = {"low": constraints.real, "high": constraints.real}

    def __init__(
        self,
        low: Tensor | float,
        high: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, low=low, high=high)

    def _log_density(self, x: Tensor) -> Tensor:
        return -(self.high - self.low).log()

    def _log_icdf(self, u: Tensor) -> Tensor:
        return self.low + u * (self.high - self.low)

    def _log_moment(self, n: int) -> Tensor:
        low, high = n * self.low.double(), n * self.high.double()
        return high + (-(low - high).expm1() / (high - low)).log()


class TruncatedLogNormal(_ExpOnInterval):
    """The exponential of a Gaussian ``N(loc, scale^2)`` truncated to [low, high].

    ``q(z) = N(log z; loc, scale^2) / (z Z)`` on [e^low, e^high], with
    ``Z = Phi((high - loc) / scale) - Phi((low - loc) / scale)``. Sampling inverts the
    CDF, and is reparameterized in all four parameters. An interval far out in a tail
    of the Gaussian does no harm: there q is nearly exponential in log z, from the end
    next to loc.

    A draw's log is exact to a few units in the last place of low, high or loc: in
    float32 a q narrower than 1e-6 of these comes out coarse. Moments and
    `entropy_of_log` are computed in float64 and rounded.

    Source: Neklyudov, Molchanov, Ashukha and Vetrov (2017, arXiv 1705.07283).

    Args:
        loc: Mean of log z before truncation; a number or ``batch_shape``.
        scale: Its standard deviation before truncation; a number or ``batch_shape``.
        low: Log of the smallest value; a number or ``batch_shape``.
        high: Log of the largest value; a number or ``batch_shape``.
        validate_args: As in Pyro; None follows ``pyro.enable_validation``.

    Raises:
        ValueError: Unless scale > 0 and low < high, both finite.

    >>> TruncatedLogNormal(5.0, 0.1, low=-20.0, high=0.0).mean
    tensor(0.9980)
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
        "low": constraints.real,
        "high": constraints.real,
    }
    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: Tensor | float,
        high: Tensor | float,
        *,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, loc=loc, scale=scale, low=low, high=high)

    def entropy_of_log(self) -> Tensor:
        """The entropy of log z in nats: ``batch_shape``; at most log(high - low).

        With A, B the ends in scales from loc, phi and Phi the standard Gaussian's
        density and CDF and ``Z = Phi(B) - Phi(A)``, it is ``log(sqrt(2 pi e) scale Z)
        + (A phi(A) - B phi(B)) / (2 Z)``.
        """
        loc, scale, low, high = (x.double() for x in self._parameters())
        mass = _relative_mass(loc, scale, low, high)
        a, b = (low - loc) / scale, (high - loc) / scale
        c = loc.clamp(low, high).sub(loc) / scale
        edges = a * ((c - a) * (c + a) / 2).exp() - b * ((c - b) * (c + b) / 2).exp()
        entropy = 0.5 + (scale * mass).log() - 0.5 * (c.square() - edges / mass)
        return entropy.to(self.loc.dtype)

    def _parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.loc, self.scale, self.low, self.high

    def _log_density(self, x: Tensor) -> Tensor:
        loc, scale, low, high = self._parameters()
        mode = loc.clamp(low, high)
        exponent = (x - mode) * (x + mode - 2 * loc) / (2 * scale.square())
        return -exponent - (scale * _relative_mass(loc, scale, low, high)).log()

    def _log_icdf(self, u: Tensor) -> Tensor:
        arguments = torch.broadcast_tensors(u, *self._parameters())
        x: Tensor = _Quantile.apply(*arguments)  # type: ignore[no-untyped-call]
        return x

    def _log_moment(self, n: int) -> Tensor:
        loc, scale, low, high = (x.double() for x in self._parameters())
        tilted = loc + n * scale.square()
        old, new = loc.clamp(low, high), tilted.clamp(low, high)
        exponent = (new - old) * (new + old - 2 * loc) / (2 * scale.square())
        before = _relative_mass(loc, scale, low, high)
        after = _relative_mass(tilted, scale, low, high)
        return n * new - exponent + (after / before).log()


def _mills(x: Tensor) -> Tensor:
    """``(1 - Phi(x)) / phi(x)`` for ``x >= 0``."""
    ratio: Tensor = math.sqrt(math.pi / 2) * erfcx(x / math.sqrt(2))
    return ratio


def _relative_mass(loc: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``Z / phi(c)``, c being where in [A, B] the density phi is largest.

    The ratio neither underflows in the tails nor loses digits there.
    """
    a, b, width = (low - loc) / scale, (high - loc) / scale, (high - low) / scale
    near, far = torch.maximum(a, -b), torch.maximum(-a, b)
    center = (near / -math.sqrt(2)).erf() + (far / math.sqrt(2)).erf()
    outside = near.clamp(min=0)
    tail = _mills(outside) - _mills(far) * (-width * (outside + far) / 2).exp()
    return torch.where(near < 0, math.sqrt(math.pi / 2) * center, tail)


class _Quantile(torch.autograd.Function):
    """The ``u``-quantile of a Gaussian truncated to [low, high]."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, loc: Tensor, scale: Tensor, low: Tensor, high: Tensor
    ) -> Tensor:
        mass = _relative_mass(loc, scale, low, high)
        a, b = (low - loc) / scale, (high - loc) / scale
        density = mass / math.sqrt(2 * math.pi)
        below, above = ndtr(a) + u * density, ndtr(-b) + (1 - u) * density
        inner = torch.where(below < above, ndtri(below), -ndtri(above))
        rightwards = a >= 0
        start = torch.where(rightwards, a, -b).clamp(min=0)
        offset = scale * _tail_offset(torch.where(rightwards, u, 1 - u), start, mass)
        tail = torch.where(rightwards, low + offset, high - offset)
        x = torch.where(torch.maximum(a, -b) < 0, loc + scale * inner, tail)
        x = x.clamp(low, high)
        ctx.save_for_backward(u, loc, scale, low, high, mass, x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """From ``d Phi(t) = (1 - u) d Phi(A) + u d Phi(B) + Z du``, t = F^-1(u)."""
        u, loc, scale, low, high, mass, x = ctx.saved_tensors

        def ratio(end: Tensor) -> Any:
            """``phi(end) / phi(x)``, both in log units."""
            return ((x - end) * (x + end - 2 * loc) / (2 * scale.square())).exp()

        to_low, to_high = (1 - u) * ratio(low), u * ratio(high)
        to_loc = 1 - to_low - to_high
        to_scale = (x - loc - to_low * (low - loc) - to_high * (high - loc)) / scale
        to_u = scale * mass * ratio(loc.clamp(low, high))
        return (
            grad * to_u,
            grad * to_loc,
            grad * to_scale,
            grad * to_low,
            grad * to_high,
        )


def _tail_offset(u: Tensor, start: Tensor, mass: Tensor) -> Tensor:
    """How far beyond ``start >= 0`` a share ``u`` of the interval's mass reaches.

    Newton's method on the log of the Gaussian survival function S: that is concave,
    and the first guess, exact up to Mills' ratio, is never too small, so the iteration
    falls monotonically to the solution.
    """
    log_survival = torch.log1p(-u * mass / _mills(start))
    drop = -2 * log_survival
    offset = drop / ((start.square() + drop).sqrt() + start)
    for _ in range(5):
        mills = _mills(start + offset)
        missing = offset * (2 * start + offset) / 2 + log_survival
        missing = missing + (_mills(start) / mills).log()
        offset = (offset - missing * mills).clamp(min=0)
    return offset
