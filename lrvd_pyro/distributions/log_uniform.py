"""The improper log-uniform distribution, and its KL divergences in nats."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import Normal, TorchDistribution, constraints
from pyro.poutine.condition_messenger import ConditionMessenger
from torch import Tensor
from torch.autograd.function import BackwardCFunction, FunctionCtx
from torch.distributions import register_kl

from lrvd_pyro._compat.pyro import mcmc_is_running, messengers

__all__ = [
    "LOG_UNIFORM_CONSTANT",
    "LogUniform",
    "dawson",
    "dawson_integral",
    "log_uniform_kl",
    "molchanov_kl",
]

# log p(z) = -log|z| - LOG_UNIFORM_CONSTANT makes KL(N(1, a) || p) -> 0 as a -> inf.
LOG_UNIFORM_CONSTANT = 0.5 * (1 + math.log(2 * math.pi) + np.euler_gamma + math.log(2))


class LogUniform(TorchDistribution):
    """The scale-invariant improper density ``p(z) = exp(-c) / |z|`` on the real line.

    The constant ``c = (1 + log 2 pi + gamma + log 2) / 2 = 2.0541`` is a convention.
    With it, a Monte Carlo KL and the closed form `log_uniform_kl` agree.

    Wrong when objectives are compared with those of another prior, or across numbers of
    components: under this prior an objective is defined up to a constant per component.
    Hron, Matthews and Ghahramani (2018, arXiv 1807.01969) show what is wrong with the
    prior itself.

    There is no prior predictive. `sample` returns ones, a placeholder, because Pyro
    runs a model once before it asks the guide.

    Source: Kingma, Salimans and Welling (2015, arXiv 1506.02557).

    Args:
        device: Where the placeholder is made; None takes torch's default.
        validate_args: As in Pyro; None follows ``pyro.enable_validation``.

    >>> LogUniform().expand([3]).to_event(1).log_prob(torch.ones(3))
    tensor(-6.1624)
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real
    has_rsample = False

    def __init__(
        self,
        *,
        device: torch.device | None = None,
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(torch.Size(), torch.Size(), validate_args=validate_args)
        self.device = device

    def expand(
        self, batch_shape: Sequence[int], _instance: object = None
    ) -> "LogUniform":
        """The same distribution with another ``batch_shape``."""
        # Pyro's plates expand every prior. torch refuses that for a class that has its
        # own __init__ and inherits `expand`.
        new: LogUniform = self._get_checked_instance(LogUniform, _instance)  # type: ignore[no-untyped-call]
        TorchDistribution.__init__(new, torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        new.device = self.device
        return new

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Ones, ``sample_shape x batch_shape``: a finite placeholder for a draw.

        Raises:
            ValueError: If a true draw is needed: by MCMC, or by `pyro.infer.Predictive`
                without guide or samples.
        """
        if mcmc_is_running():
            raise ValueError(
                "LogUniform is improper, so MCMC has no posterior to sample; choose a "
                "proper prior: priors.Normal()"
            )
        # Predictive without guide or samples conditions the model on nothing.
        if any(isinstance(h, ConditionMessenger) and not h.data for h in messengers()):
            raise ValueError(
                "LogUniform is improper and has no prior predictive; pass "
                "Predictive(model, guide=guide, ...), or choose a proper prior: "
                "priors.Normal()"
            )
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.ones(shape, device=self.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """``-log|z| - 2.0541``, in nats; infinite at 0."""
        log_prob = -value.abs().log() - LOG_UNIFORM_CONSTANT
        shape = torch.broadcast_shapes(log_prob.shape, self.batch_shape)
        return log_prob.expand(shape)


def dawson(u: Tensor) -> Tensor:
    """Dawson's function ``D(u) = exp(-u^2) int_0^u exp(t^2) dt`` for ``u >= 0``.

    The absolute error is below 1e-9 in float64. The function is differentiable any
    number of times. Wrong when ``u < 0``.

    >>> dawson(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.5381])
    """
    result: Tensor = _Dawson.apply(u)  # type: ignore[no-untyped-call]
    return result


def dawson_integral(u: Tensor) -> Tensor:
    """``F(u) = 2 int_0^u D(t) dt`` for ``u >= 0``, where D is Dawson's function.

    ``F(|m| / (sqrt(2) s))`` is the KL divergence of ``N(m, s^2)`` from `LogUniform`, in
    nats. Wrong when ``u < 0``.

    >>> dawson_integral(torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.7394])
    """
    result: Tensor = _DawsonIntegral.apply(u)  # type: ignore[no-untyped-call]
    return result


def log_uniform_kl(log_alpha: Tensor) -> Tensor:
    """The exact ``KL(N(1, alpha) || LogUniform)`` in nats, elementwise.

    ``f(alpha) = 2 int_0^u D(t) dt`` with ``u = (2 alpha)^(-1/2)`` and
    ``df / d log alpha = -u D(u)``. It falls from ``-log(alpha) / 2 + 0.6352`` to 0.
    The absolute error is below 1e-6 for log alpha in [-12, 12] in float64.

    Source: gradient in Hron, Matthews and Ghahramani (2018, arXiv 1807.01969).

    Args:
        log_alpha: Log of the noise-to-signal ratio, any shape.

    >>> log_uniform_kl(torch.tensor([-4.0, 0.0, 4.0]))
    tensor([2.6258, 0.4267, 0.0091])
    """
    return dawson_integral(torch.exp(-0.5 * (log_alpha + math.log(2))))


def molchanov_kl(log_alpha: Tensor) -> Tensor:
    """Molchanov's approximation of `log_uniform_kl`, in nats.

    ``k1 - k1 sigmoid(k2 + k3 log alpha) + log(1 + 1/alpha) / 2`` with three fitted
    constants. It serves for comparisons with published figures; the library does not
    use it. Wrong when exact values matter: it is off by up to 0.0094 nats.

    Source: Molchanov, Ashukha and Vetrov (2017, arXiv 1701.05369), equation 14.

    Args:
        log_alpha: Log of the noise-to-signal ratio, any shape.
    """
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    gate = torch.sigmoid(k2 + k3 * log_alpha)
    return k1 - k1 * gate + 0.5 * torch.nn.functional.softplus(-log_alpha)


@register_kl(Normal, LogUniform)  # type: ignore[untyped-decorator]
def _kl_normal_log_uniform(q: Normal, p: LogUniform) -> Tensor:
    kl = dawson_integral(q.loc.abs() / (math.sqrt(2) * q.scale))
    return kl.expand(torch.broadcast_shapes(kl.shape, p.batch_shape))


# torch has no Dawson function. Below _SWITCH a table of polynomials gives it, beyond
# it the asymptotic series does. The derivatives are written down: those of the table
# would jump from cell to cell. They call `dawson` again, so they can be differentiated.
class _Dawson(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        inverse = u.clamp(min=_SWITCH).reciprocal()
        large = 0.5 * inverse * (1 + _horner(_SERIES, inverse.square()))
        return torch.where(u < _SWITCH, u * _interpolate("D(u) / u", u), large)

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        slope: Tensor = 1 - 2 * u * dawson(u)
        return grad * slope


class _DawsonIntegral(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        top = u.clamp(min=_SWITCH)
        large = top.log() + _LIMIT - _horner(_SERIES_OF_F, top.reciprocal().square())
        return torch.where(
            u < _SWITCH, u.square() * _interpolate("F(u) / u^2", u), large
        )

    @staticmethod
    def backward(ctx: BackwardCFunction, grad: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        return grad * 2 * dawson(u)


# For u >= _SWITCH: 2 u D(u) = 1 + sum_k a_k u^(-2k), a_k = (2k - 1)!! / 2^k, and
# F(u) = log u + log 2 + gamma / 2 - sum_k a_k / (2k) u^(-2k).
_SWITCH = 10.0
_SERIES = [math.prod(range(1, 2 * k, 2)) / 2**k for k in range(1, 8)]
_SERIES_OF_F = [a / (2 * k) for k, a in enumerate(_SERIES, start=1)]
_LIMIT = math.log(2) + np.euler_gamma / 2
_CELLS, _DEGREE = 160, 5


def _horner(coefficients: list[float], x: Tensor) -> Tensor:
    """``sum_k coefficients[k - 1] x^k``."""
    total = torch.zeros_like(x)
    for a in reversed(coefficients):
        total = (total + a) * x
    return total


def _interpolate(name: str, u: Tensor) -> Tensor:
    """The even function ``name`` at u, from one polynomial per cell of [0, _SWITCH)."""
    # The caller's `torch.where` drops the values beyond the table, after their lookup.
    position = u.clamp(max=_SWITCH) * (_CELLS / _SWITCH)
    cell = position.long().clamp(0, _CELLS - 1)
    x = 2 * (position - cell) - 1
    *lower, total = _cells(name, u.dtype, u.device)
    total = total[cell]
    for coefficient in reversed(lower):
        total = total * x + coefficient[cell]
    return total


@cache
def _cells(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """The coefficients of each power of x in [-1, 1], one per cell, lowest first."""
    # Interpolation at Chebyshev nodes, which keeps the error even across a cell. D(u)/u
    # and F(u)/u^2 have no zero at 0, so that their relative error is bounded there.
    nodes = np.polynomial.chebyshev.chebpts1(_DEGREE + 1)
    u = (np.arange(_CELLS) + (nodes[:, None] + 1) / 2) * _SWITCH / _CELLS
    if name == "D(u) / u":
        values = _dawson_by_series(u) / u
    else:
        x, weights = np.polynomial.legendre.leggauss(100)
        values = (_dawson_by_series(u[..., None] * (1 + x) / 2) @ weights) / u
    table = np.linalg.solve(np.vander(nodes, increasing=True), values)
    return tuple(torch.tensor(row, dtype=dtype, device=device) for row in table)


def _dawson_by_series(u: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """``D(u) = u exp(-u^2) sum_k u^(2k) / (k! (2k + 1))`` for ``u <= 10``."""
    # every term is positive, unlike those of the alternating Taylor series of D
    term = np.exp(-u * u)
    total = np.zeros_like(u)
    for k in range(400):
        total += term / (2 * k + 1)
        term = term * u * u / (k + 1)
    return u * total
