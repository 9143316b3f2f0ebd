"""Distributions on ``[e^low, e^high]``: truncated log-uniform and log-normal."""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions.utils import broadcast_all, clamp_probs

from lrvd_pyro.distributions.truncated_gaussian import quantile, relative_mass

__all__ = ["TruncatedLogNormal", "TruncatedLogUniform"]


class _ExpOnInterval(TorchDistribution):
    """The distribution of ``exp(x)``, x in [low, high]; a subclass has that of x."""

    has_rsample = True
    low: Tensor
    high: Tensor
    ends: tuple[Tensor, Tensor] | tuple[float, float]  # of the support

    def __init__(
        self,
        validate_args: bool | None,
        device: torch.device | None = None,
        **parameters: Tensor | float,
    ) -> None:
        values = broadcast_all(*parameters.values())
        for name, value in zip(parameters, values):
            setattr(self, name, value.to(device))
        low, high = parameters["low"], parameters["high"]
        # Numbers stay numbers: a guide that keeps the support may be moved elsewhere.
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            self.ends = self.low.exp(), self.high.exp()
        else:
            self.ends = _exp(low), _exp(high)
        super().__init__(self.low.shape, validate_args=validate_args)
        width = self.high - self.low
        if self._validate_args and not ((width > 0) & width.isfinite()).all():
            raise ValueError(
                f"{type(self).__name__} got low={self.low} and high={self.high}; "
                f"expected finite low < high, both in log units: the support is "
                f"[exp(low), exp(high)]"
            )

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Self:
        """The same distribution with another ``batch_shape``."""
        new: Self = self._get_checked_instance(type(self), _instance)  # type: ignore[no-untyped-call]
        shape = torch.Size(batch_shape)
        for name in self.arg_constraints:
            setattr(new, name, getattr(self, name).expand(shape))
        new.ends = self.ends
        # torch's own pattern: __init__ would broadcast and check the parameters again
        TorchDistribution.__init__(new, shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> constraints.Constraint:
        """The interval ``[e^low, e^high]``."""
        return constraints.interval(*self.ends)

    @property
    def mean(self) -> Tensor:
        """``E z``, ``batch_shape``."""
        return self._log_mean_power(1).exp().to(self.low.dtype)

    @property
    def variance(self) -> Tensor:
        """``E (z - E z)^2``, ``batch_shape``."""
        # (E z)^2 expm1(...) and no difference of the two, whose digits a narrow q loses
        first, second = self._log_mean_power(1), self._log_mean_power(2)
        variance = (2 * first).exp() * (second - 2 * first).clamp(min=0).expm1()
        return variance.to(self.low.dtype)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """The `icdf` of uniform draws, ``sample_shape x batch_shape``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        uniform = torch.rand(shape, dtype=self.low.dtype, device=self.low.device)
        # torch.rand can return 0, whose quantile would be an end of the support
        return self.icdf(clamp_probs(uniform))

    def icdf(self, value: Tensor) -> Tensor:
        """The quantiles of probabilities in (0, 1), differentiable in all arguments."""
        z = self._log_icdf(value).exp()
        # rounding of exp can leave the support, where the density is 0
        return z.clamp(*self.ends)

    def log_prob(self, value: Tensor) -> Tensor:
        """The log density in nats; minus infinity outside the support."""
        if self._validate_args:
            self._validate_sample(value)
        x = value.log()
        log_prob = self._log_density(x) - x
        return torch.where(self.support.check(value), log_prob, -math.inf)

    @abstractmethod
    def _log_density(self, x: Tensor) -> Tensor:
        """The log density of ``x = log z`` in [low, high], in nats."""

    @abstractmethod
    def _log_icdf(self, u: Tensor) -> Tensor:
        """The quantiles of ``x = log z``."""

    @abstractmethod
    def _log_mean_power(self, n: int) -> Tensor:
        """``log E z^n``, in float64."""


def _exp(x: float) -> float:
    # As a tensor of the parameters' precision has it, which a clamp to it needs.
    return float(torch.tensor(x, device="cpu").exp())


class TruncatedLogUniform(_ExpOnInterval):
    """The proper log-uniform density ``p(z) = 1 / (z (high - low))``.

    The log of z is uniform on [low, high], so all orders of magnitude in between are
    equally likely. The KL divergence of a `TruncatedLogNormal` from it has a closed
    form. Wrong when q reaches beyond [low, high]: that divergence is then infinite.

    Source: Neklyudov, Molchanov, Ashukha and Vetrov (2017, arXiv 1705.07283).

    Args:
        low: Log of the smallest value, a number or ``batch_shape``.
        high: Log of the largest value, a number or ``batch_shape``.
        device: Where it is, if both ends are numbers; None takes torch's default.
        validate_args: As in Pyro; None follows ``pyro.enable_validation``.

    Raises:
        ValueError: If ``low < high`` does not hold, or one is infinite.

    >>> TruncatedLogUniform(-20.0, 0.0).mean
    tensor(0.0500)
    """

    arg_constraints = {"low": constraints.real, "high": constraints.real}

    def __init__(
        self,
        low: Tensor | float,
        high: Tensor | float,
        *,
        device: torch.device | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(validate_args, device, low=low, high=high)

    def _log_density(self, x: Tensor) -> Tensor:
        return -(self.high - self.low).log()

    def _log_icdf(self, u: Tensor) -> Tensor:
        return self.low + u * (self.high - self.low)

    def _log_mean_power(self, n: int) -> Tensor:
        low, high = n * self.low.double(), n * self.high.double()
        return high + (-(low - high).expm1() / (high - low)).log()


class TruncatedLogNormal(_ExpOnInterval):
    """The exponential of a Gaussian ``N(loc, scale^2)`` truncated to [low, high].

    ``q(z) = N(log z; loc, scale^2) / (z Z)`` on [e^low, e^high], with
    ``Z = Phi((high - loc) / scale) - Phi((low - loc) / scale)``. Sampling inverts the
    CDF, and is reparameterized in all four parameters. The interval may lie far out in
    a tail of the Gaussian. There q is nearly exponential in log z, from the end next to
    loc.

    The mean, the variance and `entropy_of_log` are computed in float64 and rounded.
    The log of a draw is exact to a few units in the last place of low, high or loc.
    Wrong when, in float32, q is narrower than 1e-6 of these: its draws are coarse.

    Source: Neklyudov, Molchanov, Ashukha and Vetrov (2017, arXiv 1705.07283).

    Args:
        loc: Mean of log z before truncation, a number or ``batch_shape``.
        scale: Standard deviation of log z before truncation, a number or
            ``batch_shape``.
        low: Log of the smallest value, a number or ``batch_shape``.
        high: Log of the largest value, a number or ``batch_shape``.
        validate_args: As in Pyro; None follows ``pyro.enable_validation``.

    Raises:
        ValueError: If ``scale > 0`` or ``low < high`` does not hold, or an end is
            infinite.

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
        """The entropy of log z in nats, ``batch_shape``; at most ``log(high - low)``.

        ``log(sqrt(2 pi e) scale Z) + (A phi(A) - B phi(B)) / (2 Z)`` with the ends
        ``A = (low - loc) / scale`` and ``B = (high - loc) / scale``, and
        ``Z = Phi(B) - Phi(A)``. The standard Gaussian has density phi and CDF Phi.
        """
        # all densities relative to that at c, the point next to loc: phi(A), phi(B) and
        # Z underflow together in a tail, and their ratios do not
        loc, scale, low, high = (x.double() for x in self._parameters())
        mass = relative_mass(loc, scale, low, high)
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
        return -exponent - (scale * relative_mass(loc, scale, low, high)).log()

    def _log_icdf(self, u: Tensor) -> Tensor:
        return quantile(u, *self._parameters())

    def _log_mean_power(self, n: int) -> Tensor:
        loc, scale, low, high = (x.double() for x in self._parameters())
        # z^n N(log z; loc) is a multiple of N(log z; tilted), on the same interval
        tilted = loc + n * scale.square()
        old, new = loc.clamp(low, high), tilted.clamp(low, high)
        exponent = (new - old) * (new + old - 2 * loc) / (2 * scale.square())
        before = relative_mass(loc, scale, low, high)
        after = relative_mass(tilted, scale, low, high)
        return n * new - exponent + (after / before).log()
