"""KL divergences in nats that ``torch.distributions`` lacks, registered with it.

======================  =======================  =============================
q                       p                        how
======================  =======================  =============================
TruncatedLogNormal      TruncatedLogUniform      closed; inf if q exceeds p's
                                                 interval
LogNormal               HalfCauchy               `expected_softplus`
Normal                  Logistic                 `expected_softplus`
LogNormal               HalfNormal, Gamma,       closed, by ``E_q z^n``
                        InverseGamma,
                        Exponential
======================  =======================  =============================

Wrong when a log-normal has a scale above 6: ``E_q z^n`` then overflows float32.

Source: Louizos, Ullrich and Welling (2017, arXiv 1705.08665) for half-Cauchy scales
under a log-normal; Neklyudov, Molchanov, Ashukha and Vetrov (2017, arXiv 1705.07283)
for the truncated pair.
"""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from pyro.distributions import Logistic
from torch import Tensor
from torch.distributions import (
    Exponential,
    Gamma,
    HalfCauchy,
    HalfNormal,
    InverseGamma,
    LogNormal,
    Normal,
    register_kl,
)
from torch.nn.functional import logsigmoid
from torch.special import ndtr

from lrvd_pyro.distributions.truncated import TruncatedLogNormal, TruncatedLogUniform

__all__ = ["expected_softplus"]

_NODES, _REACH, _WIDE = 32, 30.0, 1.5  # log(1 + e^-|x|) is below 1e-13 beyond _REACH


def expected_softplus(loc: Tensor, scale: Tensor) -> Tensor:
    """``E log(1 + e^x)`` for a Gaussian ``x ~ N(loc, scale^2)``, by quadrature.

    Up to a scale of 1.5 it uses Gauss-Hermite quadrature with 32 nodes. Beyond, it adds
    ``E max(x, 0)`` in closed form to ``E log(1 + e^-|x|)`` by Gauss-Legendre quadrature
    with 32 nodes on each side of 0. The absolute error is below 1e-9 in float64 at
    every scale.

    Args:
        loc: The mean, any shape.
        scale: The standard deviation, of a shape that broadcasts with ``loc``.

    Returns:
        The expectation in nats, of the broadcast shape.

    >>> expected_softplus(torch.zeros(2), torch.tensor([1e-6, 10.0]))
    tensor([0.6931, 4.0543])
    """
    # `torch.where` sends gradients into both branches, so each must be finite at every
    # scale. A wide Gaussian sees the kink of the softplus, which no polynomial fits:
    # log(1 + e^x) = max(x, 0) + log(1 + e^-|x|), and the second part is narrow.
    narrow, wide = scale.clamp(max=_WIDE), scale.clamp(min=_WIDE)
    x, weights = _hermite(loc.dtype, loc.device)
    smooth = -logsigmoid(-(loc[..., None] + narrow[..., None] * x)) @ weights

    standard = loc / wide
    ramp = loc * ndtr(standard) + wide * _density(standard)
    x, weights = _legendre(loc.dtype, loc.device)
    kink = _density((x - loc[..., None]) / wide[..., None]) @ weights / wide
    return torch.where(scale < _WIDE, smooth, ramp + kink)


@register_kl(TruncatedLogNormal, TruncatedLogUniform)  # type: ignore[untyped-decorator]
def _kl_truncated(q: TruncatedLogNormal, p: TruncatedLogUniform) -> Tensor:
    kl = (p.high - p.low).log() - q.entropy_of_log()
    covered = (p.low <= q.low) & (q.high <= p.high)
    return torch.where(covered, kl, math.inf)


@register_kl(LogNormal, HalfCauchy)  # type: ignore[untyped-decorator]
def _kl_half_cauchy(q: LogNormal, p: HalfCauchy) -> Tensor:
    # log(1 + (z / s)^2) is the softplus of 2 (log z - log s)
    heavy = expected_softplus(2 * (q.loc - p.scale.log()), 2 * q.scale)
    return _negative_entropy(q) - math.log(2 / math.pi) + p.scale.log() + heavy


@register_kl(Normal, Logistic)  # type: ignore[untyped-decorator]
def _kl_logistic(q: Normal, p: Logistic) -> Tensor:
    loc, scale = (q.loc - p.loc) / p.scale, q.scale / p.scale
    kl: Tensor = p.scale.log() - q.entropy() + 2 * expected_softplus(loc, scale) - loc
    return kl


@register_kl(LogNormal, HalfNormal)  # type: ignore[untyped-decorator]
def _kl_half_normal(q: LogNormal, p: HalfNormal) -> Tensor:
    square = _mean_power(q, 2) / (2 * p.scale.square())
    return _negative_entropy(q) - math.log(2 / math.pi) / 2 + p.scale.log() + square


@register_kl(LogNormal, Gamma)  # type: ignore[untyped-decorator]
def _kl_gamma(q: LogNormal, p: Gamma) -> Tensor:
    normalizer = p.concentration.lgamma() - p.concentration * p.rate.log()
    power = (1 - p.concentration) * q.loc
    return _negative_entropy(q) + normalizer + power + p.rate * _mean_power(q, 1)


@register_kl(LogNormal, InverseGamma)  # type: ignore[untyped-decorator]
def _kl_inverse_gamma(q: LogNormal, p: InverseGamma) -> Tensor:
    normalizer = p.concentration.lgamma() - p.concentration * p.rate.log()
    power = (1 + p.concentration) * q.loc
    return _negative_entropy(q) + normalizer + power + p.rate * _mean_power(q, -1)


@register_kl(LogNormal, Exponential)  # type: ignore[untyped-decorator]
def _kl_exponential(q: LogNormal, p: Exponential) -> Tensor:
    return _negative_entropy(q) - p.rate.log() + p.rate * _mean_power(q, 1)


def _negative_entropy(q: LogNormal) -> Tensor:
    """``E_q log q(z)``, in nats."""
    return -q.loc - q.scale.log() - 0.5 * (1 + math.log(2 * math.pi))


def _mean_power(q: LogNormal, n: int) -> Tensor:
    """``E_q z^n``, which overflows float32 for wide q."""
    return (n * q.loc + 0.5 * (n * q.scale).square()).exp()


def _density(x: Tensor) -> Tensor:
    return (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)


@cache
def _hermite(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes and weights of an expectation under N(0, 1)."""
    x, weights = np.polynomial.hermite_e.hermegauss(_NODES)
    return _tensors(x, weights / weights.sum(), dtype, device)


@cache
def _legendre(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Nodes on the real line, and their weights times ``log(1 + e^-|x|)``."""
    x, weights = np.polynomial.legendre.leggauss(_NODES)
    x, weights = _REACH * (1 + x) / 2, _REACH * weights / 2
    weights = weights * np.log1p(np.exp(-x))
    return _tensors(np.r_[-x, x], np.r_[weights, weights], dtype, device)


def _tensors(
    x: np.ndarray[Any, Any],
    weights: np.ndarray[Any, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    nodes = torch.tensor(x, dtype=dtype, device=device)
    return nodes, torch.tensor(weights, dtype=dtype, device=device)
