"""Every registered KL divergence, against quadrature and Monte Carlo."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from pyro import distributions as dist
from scipy.integrate import quad, simpson
from torch.distributions import Distribution, kl_divergence

from lrvd_pyro.distributions import (
    TruncatedLogNormal,
    TruncatedLogUniform,
    expected_softplus,
)

Pair = tuple[Distribution, Distribution]

# each maps (loc, scale, first and second parameter of p) to (q, p)
PAIRS: dict[str, Callable[..., Pair]] = {
    "half-Cauchy": lambda m, s, a, b: (dist.LogNormal(m, s), dist.HalfCauchy(a)),
    "half-normal": lambda m, s, a, b: (dist.LogNormal(m, s), dist.HalfNormal(a)),
    "exponential": lambda m, s, a, b: (dist.LogNormal(m, s), dist.Exponential(a)),
    "gamma": lambda m, s, a, b: (dist.LogNormal(m, s), dist.Gamma(a, b)),
    "inverse gamma": lambda m, s, a, b: (
        dist.LogNormal(m, s),
        dist.InverseGamma(a, b),
    ),
    "logistic": lambda m, s, a, b: (dist.Normal(m, s), dist.Logistic(a, b)),
    "log-uniform": lambda m, s, a, b: (
        TruncatedLogNormal(m, s, -a, b),
        TruncatedLogUniform(-a - b, 2 * b),
    ),
}
GAUSSIANS = [(0.3, 1.2), (-2.0, 0.05), (1.5, 0.4)]
PARAMETERS = (0.7, 1.9)

pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
gaussians = pytest.mark.parametrize("gaussian", GAUSSIANS, ids=str)


def by_quadrature(q: Distribution, p: Distribution) -> float:
    """``int q (log q - log p)`` by Simpson's rule, in log z where z is positive."""
    on_the_line = isinstance(q, dist.Normal)
    if isinstance(q, TruncatedLogNormal):
        ends = q.icdf(torch.tensor([1e-17, 1 - 1e-16])).log()
        x = torch.linspace(*ends.tolist(), 20_001)
    else:
        x = q.loc + q.scale * torch.linspace(-14, 14, 20_001)
    z = x if on_the_line else x.exp()
    if isinstance(q, TruncatedLogNormal):
        z = z.clamp(q.low.exp(), q.high.exp())
    log_q = q.log_prob(z)
    weight = log_q.exp() * (1 if on_the_line else z)
    return float(simpson((weight * (log_q - p.log_prob(z))).numpy(), x=x.numpy()))


@pairs
@gaussians
def test_kl_equals_quadrature(
    pair: Callable[..., Pair], gaussian: tuple[float, float]
) -> None:
    q, p = pair(*gaussian, *PARAMETERS)
    assert float(kl_divergence(q, p)) == pytest.approx(by_quadrature(q, p), abs=1e-8)


@pairs
@gaussians
def test_kl_equals_monte_carlo(
    pair: Callable[..., Pair], gaussian: tuple[float, float]
) -> None:
    q, p = pair(*gaussian, *PARAMETERS)
    draws = q.sample((200_000,))
    estimate = q.log_prob(draws) - p.log_prob(draws)
    error = estimate.std() / len(draws) ** 0.5
    kl = kl_divergence(q, p)
    assert (estimate.mean() - kl).abs() < 5 * error
    # the twin: ten errors off, the same test fails
    assert (estimate.mean() - kl - 10 * error).abs() > 5 * error


@pairs
@gaussians
def test_gradients_equal_finite_differences(
    pair: Callable[..., Pair], gaussian: tuple[float, float]
) -> None:
    values = (*gaussian, *PARAMETERS)
    arguments = tuple(torch.tensor(v, requires_grad=True) for v in values)
    assert torch.autograd.gradcheck(lambda *v: kl_divergence(*pair(*v)), arguments)


@pairs
@pytest.mark.parametrize("gaussian", [*GAUSSIANS, (-20.0, 1e-3), (5.0, 5.0)], ids=str)
def test_float32_is_finite_and_near_float64(
    pair: Callable[..., Pair], gaussian: tuple[float, float]
) -> None:
    values = (*gaussian, *PARAMETERS)
    exact = kl_divergence(*pair(*(torch.tensor(v) for v in values)))
    arguments = [
        torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in values
    ]
    kl = kl_divergence(*pair(*arguments))
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=1e-4)
    used = torch.autograd.grad(kl, arguments, allow_unused=True)
    assert all(g.isfinite() for g in used if g is not None)


@pairs
def test_event_dims_and_expansion_sum_and_repeat(pair: Callable[..., Pair]) -> None:
    q, p = pair(torch.tensor([0.3, -1.0, 0.0, 0.2]), 0.5, *PARAMETERS)
    each = kl_divergence(q, p)
    assert each.shape == (4,)
    p = p.expand((4,))
    joint = kl_divergence(q.to_event(1), p.to_event(1))
    torch.testing.assert_close(joint, each.sum())
    batched = kl_divergence(q.expand((3, 4)).to_event(1), p.expand((3, 4)).to_event(1))
    torch.testing.assert_close(batched, joint.expand(3))
    q, p = pair(0.3, 0.5, *PARAMETERS)
    assert kl_divergence(q, p.expand((2, 1))).shape == (2, 1)


def test_the_classes_of_torch_have_the_same_divergences() -> None:
    q = torch.distributions.LogNormal(0.3, 0.5)
    for name in ("HalfCauchy", "HalfNormal", "Exponential"):
        of_torch = kl_divergence(q, getattr(torch.distributions, name)(0.7))
        of_pyro = kl_divergence(dist.LogNormal(0.3, 0.5), getattr(dist, name)(0.7))
        torch.testing.assert_close(of_torch, of_pyro)
    for name in ("Gamma", "InverseGamma"):
        of_torch = kl_divergence(q, getattr(torch.distributions, name)(0.7, 1.9))
        p = getattr(dist, name)(0.7, 1.9)
        of_pyro = kl_divergence(dist.LogNormal(0.3, 0.5), p)
        torch.testing.assert_close(of_torch, of_pyro)


def test_the_kl_between_two_log_normals_is_still_that_of_their_logs() -> None:
    kl = kl_divergence(dist.LogNormal(0.3, 0.5), dist.LogNormal(-1.0, 2.0))
    normal = kl_divergence(dist.Normal(0.3, 0.5), dist.Normal(-1.0, 2.0))
    torch.testing.assert_close(kl, normal)


def softplus_by_quadrature(loc: float, scale: float) -> float:
    def integrand(x: float) -> float:
        density = math.exp(-0.5 * ((x - loc) / scale) ** 2)
        return float(np.logaddexp(0, x)) * density / (scale * math.sqrt(2 * math.pi))

    ends = sorted({loc + k * scale for k in range(-12, 13, 2)} | {0.0, -10.0, 10.0})
    return sum(
        quad(integrand, a, b, epsabs=1e-13, epsrel=1e-12)[0]
        for a, b in zip(ends, ends[1:])
        if abs((a + b) / 2 - loc) < 12 * scale
    )


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0, 1.499, 1.5, 2.0, 5.0, 10.0, 50.0])
def test_expected_softplus_equals_quadrature_to_1e_9(scale: float) -> None:
    loc = torch.tensor([-30.0, -8.0, -2.0, -0.5, 0.0, 0.1, 1.0, 4.0, 12.0, 40.0])
    exact = torch.tensor([softplus_by_quadrature(float(m), scale) for m in loc])
    value = expected_softplus(loc, torch.tensor(scale))
    assert (value - exact).abs().max() < 1e-9


def test_gauss_hermite_alone_would_fail_for_a_wide_gaussian() -> None:
    x, weights = np.polynomial.hermite_e.hermegauss(32)
    plain = np.logaddexp(0, 0.5 + 10 * x) @ weights / weights.sum()
    assert abs(plain - softplus_by_quadrature(0.5, 10.0)) > 1e-3


@pytest.mark.parametrize("scale", [0.01, 0.1, 0.5, 0.7499, 0.75, 1.0, 2.0, 5.0])
def test_half_cauchy_kl_is_right_to_1e_6_for_any_width(scale: float) -> None:
    for loc in (-20.0, -3.0, 0.0, 0.4, 10.0):
        q, p = dist.LogNormal(loc, scale), dist.HalfCauchy(0.7)
        exact = by_quadrature(q, p)
        assert float(kl_divergence(q, p)) == pytest.approx(exact, abs=1e-6)
        # the twin: the bound is far from what a wrong constant would do
        assert float(kl_divergence(q, p)) + 1e-5 != pytest.approx(exact, abs=1e-6)


def test_slope_is_smooth_where_the_quadratures_meet() -> None:
    scale = torch.tensor([1.5 - 1e-9, 1.5 + 1e-9], requires_grad=True)
    loc = torch.tensor([0.4, 0.4], requires_grad=True)
    value = expected_softplus(loc, scale)
    slopes = torch.autograd.grad(value.sum(), (loc, scale))
    for pair in (value, *slopes):
        torch.testing.assert_close(pair[0], pair[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("low, high", [(-4.0, 0.0), (-3.0, 1.0), (-4.0, 1.0)])
def test_kl_is_infinite_where_q_reaches_beyond_p(low: float, high: float) -> None:
    loc = torch.tensor([-1.0, -1.0], requires_grad=True)
    q = TruncatedLogNormal(loc, 0.5, torch.tensor([low, -3.0]), torch.tensor([high, 0]))
    kl = kl_divergence(q, TruncatedLogUniform(-3.0, 0.0))
    assert kl[0] == math.inf and kl[1].isfinite()
    (gradient,) = torch.autograd.grad(kl[1], loc)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("loc, scale", [(5.0, 0.1), (-60.0, 0.1), (2.0, 0.01)])
def test_far_in_a_tail_the_kl_is_that_of_an_exponential(
    loc: float, scale: float, dtype: torch.dtype
) -> None:
    mean = torch.tensor(loc, dtype=dtype, requires_grad=True)
    q = TruncatedLogNormal(mean, scale, -20.0, 1.0)
    kl = kl_divergence(q, TruncatedLogUniform(-20.0, 1.0))
    (slope,) = torch.autograd.grad(kl, mean)
    outside = loc - 1 if loc > 1 else -20 - loc
    rate = outside / scale**2
    assert kl.item() == pytest.approx(math.log(21) + math.log(rate) - 1, abs=2e-3)
    assert slope.item() == pytest.approx(math.copysign(1 / outside, loc), rel=2e-2)


def test_wide_truncated_log_normal_is_no_nats_from_log_uniform() -> None:
    p = TruncatedLogUniform(-20.0, 0.0)
    wide = kl_divergence(TruncatedLogNormal(-7.0, 1e6, -20.0, 0.0), p)
    assert float(wide) == pytest.approx(0, abs=1e-8)
    narrow = kl_divergence(TruncatedLogNormal(-7.0, 0.1, -20.0, 0.0), p)
    gaussian = math.log(20) - 0.5 * math.log(2 * math.pi * math.e * 0.1**2)
    assert float(narrow) == pytest.approx(gaussian, abs=1e-12)
