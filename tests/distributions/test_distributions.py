"""The log-uniform prior and its closed forms, against quadrature and Monte Carlo."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import distributions as dist
from scipy.integrate import quad
from scipy.special import dawsn
from torch.distributions import kl_divergence

from lrvd_pyro.distributions import (
    LogUniform,
    TruncatedLogUniform,
    dawson,
    dawson_integral,
    log_uniform_kl,
    molchanov_kl,
)

LOG_ALPHA = torch.linspace(-12, 12, 481, dtype=torch.float64)


def by_quadrature(log_alpha: float) -> float:
    u = math.exp(-0.5 * (log_alpha + math.log(2)))
    pieces = [0.0, *[p for p in (1.0, 3.0, 10.0, 50.0) if p < u], u]
    return 2 * sum(
        quad(dawsn, a, b, epsabs=1e-12, limit=200)[0]
        for a, b in zip(pieces, pieces[1:])
    )


def test_kl_equals_quadrature_to_1e_6() -> None:
    exact = torch.tensor([by_quadrature(float(x)) for x in LOG_ALPHA])
    assert (log_uniform_kl(LOG_ALPHA) - exact).abs().max() < 1e-6


def test_quadrature_would_find_molchanovs_approximation_wrong() -> None:
    exact = torch.tensor([by_quadrature(float(x)) for x in LOG_ALPHA])
    assert 0.009 < float((molchanov_kl(LOG_ALPHA) - exact).abs().max()) < 0.0095


def test_slope_is_minus_u_times_dawson_to_1e_6() -> None:
    log_alpha = LOG_ALPHA.clone().requires_grad_()
    (slope,) = torch.autograd.grad(log_uniform_kl(log_alpha).sum(), log_alpha)
    u = np.exp(-0.5 * (LOG_ALPHA.numpy() + math.log(2)))
    assert np.abs(slope.numpy() + u * dawsn(u)).max() < 1e-6


@settings(deadline=None, max_examples=50)
@given(st.floats(-11.9, 11.9))
def test_slope_equals_finite_differences(log_alpha: float) -> None:
    x = torch.tensor(log_alpha, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_uniform_kl(x), x)
    difference = (log_uniform_kl(x + 1e-4) - log_uniform_kl(x - 1e-4)) / 2e-4
    assert float((slope - difference).detach()) == pytest.approx(0.0, abs=1e-6)


def test_gradcheck_of_both_derivatives() -> None:
    u = torch.tensor([0.0, 0.01, 0.7, 3.0, 9.99, 10.01, 80.0], requires_grad=True)
    assert torch.autograd.gradcheck(dawson, (u,))
    assert torch.autograd.gradcheck(dawson_integral, (u,))
    assert torch.autograd.gradgradcheck(dawson_integral, (u,))


def test_kl_is_finite_and_monotone_in_float32_far_beyond() -> None:
    log_alpha = torch.arange(-80, 80, 0.25, dtype=torch.float32).requires_grad_()
    kl = log_uniform_kl(log_alpha)
    (slope,) = torch.autograd.grad(kl.sum(), log_alpha)
    assert kl.isfinite().all() and slope.isfinite().all()
    assert (kl.diff() <= 0).all() and (slope <= 0).all() and kl[-1] >= 0


@pytest.mark.parametrize("log_alpha", [-6.0, -1.0, 0.0, 2.0, 6.0])
def test_monte_carlo_kl_agrees_with_closed_form(log_alpha: float) -> None:
    q = dist.Normal(1.0, math.exp(log_alpha / 2))
    draws = q.sample((200_000,))
    estimate = q.log_prob(draws) - LogUniform().log_prob(draws)
    error = estimate.std() / len(draws) ** 0.5
    exact = log_uniform_kl(torch.tensor(log_alpha))
    assert abs(estimate.mean() - exact) < 5 * error
    # the twin: without the constant the same test fails
    assert abs(estimate.mean() - 2.0541 - exact) > 5 * error


def test_kl_depends_on_the_noise_to_signal_ratio_alone() -> None:
    loc, scale = torch.tensor([-3.0, 0.5, 2.0]), torch.tensor([0.3, 1.0, 4.0])
    prior = LogUniform().expand([3])
    kl = kl_divergence(dist.Normal(loc, scale), prior)
    log_alpha = 2 * (scale / loc.abs()).log()
    torch.testing.assert_close(kl, log_uniform_kl(log_alpha))
    torch.testing.assert_close(
        kl, kl_divergence(dist.Normal(7 * loc, 7 * scale), prior)
    )


def test_kl_and_its_gradient_are_finite_where_the_mean_is_zero() -> None:
    loc = torch.zeros(2, requires_grad=True)
    scale = torch.ones(2, requires_grad=True)
    kl = kl_divergence(dist.Normal(loc, scale), LogUniform()).sum()
    gradients = torch.autograd.grad(kl, (loc, scale))
    assert kl == 0 and all((g == 0).all() for g in gradients)


def test_registered_kl_survives_event_dims_and_expansion() -> None:
    q = dist.Normal(torch.ones(4), 0.5).to_event(1)
    p = LogUniform().expand([4]).to_event(1)
    assert kl_divergence(q, p).shape == ()
    torch.testing.assert_close(
        kl_divergence(q, p), 4 * log_uniform_kl(torch.tensor(2 * math.log(0.5)))
    )
    batched = kl_divergence(q.expand([3]), p.expand([3]))
    torch.testing.assert_close(batched, kl_divergence(q, p).expand(3))


def test_log_uniform_is_scale_invariant_and_its_sample_a_placeholder() -> None:
    p = LogUniform().expand([2])
    z = torch.tensor([0.2, -3.0])
    torch.testing.assert_close(p.log_prob(10 * z), p.log_prob(z) - math.log(10))
    assert p.sample(torch.Size([5])).shape == (5, 2)
    assert (p.sample() == 1).all() and not p.has_rsample


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ends", [(-20.3, 2.1), (-0.1, 0.7)])
def test_draws_between_numbers_reach_the_ends_and_not_beyond(
    ends: tuple[float, float], dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    gates = TruncatedLogUniform(*ends).expand([3])
    tiny = torch.finfo(dtype).eps
    edges = gates.icdf(torch.tensor([tiny, 0.5, 1 - tiny]))
    assert gates.log_prob(edges).isfinite().all()
    beyond = edges * torch.tensor([0.9, 1.0, 1.1])
    assert gates.support.check(beyond).tolist() == [False, True, False]


def test_ends_that_are_numbers_are_on_no_device_and_may_overflow() -> None:
    torch.set_default_dtype(torch.float32)
    gates = TruncatedLogUniform(-20.0, 200.0)
    bounds = gates.support
    assert isinstance(bounds.lower_bound, float) and bounds.upper_bound == math.inf
    assert gates.icdf(torch.tensor(0.1)).isfinite()
