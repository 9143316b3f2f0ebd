"""The truncated gates: density, mean, variance, quantiles and their gradients."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from pyro import distributions as dist
from pyro.distributions.testing import gof
from scipy.integrate import quad
from scipy.stats import chi2
from torch import Tensor
from torch.distributions import transform_to

from lrvd_pyro.distributions import TruncatedLogNormal, TruncatedLogUniform

FAILURE_RATE = 2e-5

# loc, scale, low, high; in the last four the interval lies in a tail
NORMALS = [
    (0.0, 1.0, -1.0, 2.0),
    (-3.0, 0.01, -20.0, 0.0),
    (-20.0, 2.0, -20.0, 0.0),
    (-5.0, 50.0, -20.0, 0.0),
    (0.3, 1.0, 0.2, 0.25),
    (5.0, 0.1, -20.0, 2.0),
    (-60.0, 0.1, -20.0, 2.0),
    (-60.0, 1.0, -20.0, 0.0),
    (3.0, 1.0, -1.01, -1.0),
]
UNIFORMS = [(-20.0, 0.0), (-1.0, 2.0)]
Gate = TruncatedLogNormal | TruncatedLogUniform


@pytest.fixture(params=[*NORMALS, *UNIFORMS], ids=str)
def gate(request: pytest.FixtureRequest) -> Gate:
    kind = TruncatedLogNormal if len(request.param) == 4 else TruncatedLogUniform
    return kind(*request.param)


@pytest.fixture(autouse=True)
def exact_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Pyro's chi2sf, which rises again to 1 for statistics above about 100."""
    monkeypatch.setattr(gof, "chi2sf", chi2.sf)


def expectation(
    gate: Gate, power: int, center: float = 0, unit: float = 1, top: float = 1
) -> float:
    """``E ((z - center) / unit)^power`` up to the ``top`` quantile, by quadrature."""

    def integrand(x: float) -> float:
        z = torch.tensor(x).exp().clamp(gate.low.exp(), gate.high.exp())
        return float(gate.log_prob(z).exp() * z * ((z - center) / unit) ** power)

    share = torch.tensor([1e-12, 1e-9, 1e-6, 1e-3, 0.1, 0.3])
    share = torch.cat([share, 1 - share.flip(0)])
    inner = gate.icdf(share[share < top]).log().tolist()
    end = gate.high if top == 1 else gate.icdf(torch.tensor(top)).log()
    ends = [float(gate.low), *inner, float(end)]
    return sum(
        quad(integrand, a, b, epsabs=1e-10, epsrel=1e-8)[0]
        for a, b in pairwise(ends)
        if b - a > 1e-12  # between closer ends lie too few floats
    )


def test_density_integrates_to_one(gate: Gate) -> None:
    assert expectation(gate, 0) == pytest.approx(1, abs=1e-7)


def test_quantile_leaves_its_share_of_the_mass_below(gate: Gate) -> None:
    for share in (0.01, 0.5, 0.99):
        assert expectation(gate, 0, top=share) == pytest.approx(share, rel=1e-7)


def test_mean_and_variance_equal_quadrature(gate: Gate) -> None:
    mean, sd = float(gate.mean), float(gate.stddev)
    assert expectation(gate, 1, unit=mean) == pytest.approx(1, abs=1e-7)
    assert expectation(gate, 2, mean, sd) == pytest.approx(1, abs=1e-4)


def test_samples_have_the_mean(gate: Gate) -> None:
    draws = gate.sample((100_000,))
    error = draws.std() / len(draws) ** 0.5
    assert (draws.mean() - gate.mean).abs() < 5 * error
    # the twin: half a standard deviation off is seen
    assert (draws.mean() - gate.mean - gate.stddev / 2).abs() > 5 * error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_lie_in_the_support(gate: Gate, dtype: torch.dtype) -> None:
    parameters = [getattr(gate, name).to(dtype) for name in gate.arg_constraints]
    gate = type(gate)(*parameters)
    draws = gate.sample((20_000,))
    assert draws.dtype == dtype
    assert gate.support.check(draws).all() and gate.log_prob(draws).isfinite().all()


def test_samples_are_all_different(gate: Gate) -> None:
    draws = gate.sample((20_000,))
    assert draws.unique().numel() == draws.numel()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_extreme_float32_draws_are_not_thrown_to_the_ends(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = torch.tensor([0.0, 1.0, -50.0, 50.0], dtype=torch.float32)
    q = TruncatedLogNormal(*parameters)
    monkeypatch.setattr(
        torch, "rand", lambda shape, **kw: torch.full(shape, uniform, **kw)
    )
    assert 5 < q.rsample().log().abs() < 6


def test_sampler_fits_its_density(gate: Gate) -> None:
    draws = gate.sample((20_000,))
    density = gate.log_prob(draws).exp()
    assert gof.auto_goodness_of_fit(draws, density) > FAILURE_RATE
    # the twin: a density that leans from one end to the other
    share = draws.argsort().argsort() / len(draws)
    leaning = density * (0.25 + 1.5 * share)
    assert gof.auto_goodness_of_fit(draws, leaning) < FAILURE_RATE


def test_log_normal_sampler_fits_its_density() -> None:
    q = dist.LogNormal(-1.0, 0.5)
    draws = q.sample((20_000,))
    assert gof.auto_goodness_of_fit(draws, q.log_prob(draws).exp()) > FAILURE_RATE
    other = TruncatedLogNormal(-1.0, 0.75, -20.0, 20.0).log_prob(draws).exp()
    assert gof.auto_goodness_of_fit(draws, other) < FAILURE_RATE


SHARES = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.99], dtype=torch.float64)


@pytest.mark.parametrize("parameters", NORMALS, ids=str)
def test_quantile_gradients_equal_finite_differences(
    parameters: tuple[float, float, float, float],
) -> None:
    arguments = [torch.tensor(v, requires_grad=True) for v in parameters]
    step = 1e-7 if parameters[3] - parameters[2] < 0.1 else 1e-6

    def log_quantile(u: Tensor, *arguments: Tensor) -> Tensor:
        loc, scale, low, high = arguments
        return TruncatedLogNormal(loc, scale, low, high).icdf(u).log()

    u = SHARES.clone().requires_grad_()
    assert torch.autograd.gradcheck(log_quantile, (u, *arguments), eps=step, atol=1e-4)


def test_gradients_of_the_log_uniform_quantile_equal_finite_differences() -> None:
    low, high = torch.tensor(-3.0), torch.tensor(1.0)
    arguments = (SHARES, low.requires_grad_(), high.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda u, low, high: TruncatedLogUniform(low, high).icdf(u), arguments
    )


def test_rsample_carries_the_gradient_of_the_mean() -> None:
    loc, scale = torch.tensor(-1.0), torch.tensor(0.8)
    loc.requires_grad_()
    scale.requires_grad_()
    q = TruncatedLogNormal(loc, scale, -2.0, 0.5)
    exact = torch.autograd.grad(q.mean, (loc, scale), retain_graph=True)
    draws = q.expand([100_000]).rsample()
    for parameter, gradient in zip((loc, scale), exact):
        jacobian = _per_draw(parameter, loc, scale)
        error = jacobian.std() / len(jacobian) ** 0.5
        (path,) = torch.autograd.grad(draws.mean(), parameter, retain_graph=True)
        assert (path - gradient).abs() < 5 * error
        # the twin: a tenth too much is seen
        assert (1.1 * path - gradient).abs() > 5 * error


def _per_draw(parameter: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """The pathwise derivative of each of 100,000 draws with respect to a parameter."""
    each = [v.detach().expand(100_000).clone().requires_grad_() for v in (loc, scale)]
    draws = TruncatedLogNormal(*each, -2.0, 0.5).rsample()
    (gradient,) = torch.autograd.grad(draws.sum(), each[0 if parameter is loc else 1])
    return gradient


@pytest.mark.parametrize("parameters", NORMALS[:5], ids=str)
def test_gradients_of_density_and_mean_equal_finite_differences(
    parameters: tuple[float, float, float, float],
) -> None:
    z = TruncatedLogNormal(*(torch.tensor(v) for v in parameters)).icdf(SHARES)
    arguments = tuple(torch.tensor(v, requires_grad=True) for v in parameters)
    inner = z[1:4]  # away from the ends, which move
    assert torch.autograd.gradcheck(
        lambda *a: TruncatedLogNormal(*a).log_prob(inner), arguments, atol=1e-4
    )
    assert torch.autograd.gradcheck(
        lambda *a: TruncatedLogNormal(*a).mean, arguments, atol=1e-4
    )


@pytest.mark.parametrize("parameters", NORMALS, ids=str)
def test_float32_gradients_are_finite_in_the_tails(
    parameters: tuple[float, float, float, float],
) -> None:
    arguments = [
        torch.tensor(v, dtype=torch.float32, requires_grad=True) for v in parameters
    ]
    q = TruncatedLogNormal(*arguments)
    draws = q.rsample((1000,))
    total = draws.sum() + q.log_prob(draws.detach()).sum() + q.mean
    gradients = torch.autograd.grad(total, arguments)
    assert all(g.isfinite() for g in gradients)


@pytest.mark.parametrize("parameters", NORMALS, ids=str)
def test_entropy_of_log_is_minus_the_mean_log_density(
    parameters: tuple[float, float, float, float],
) -> None:
    q = TruncatedLogNormal(*(torch.tensor(v) for v in parameters))
    draws = q.sample((100_000,))
    surprise = -q.log_prob(draws) - draws.log()
    error = surprise.std() / len(draws) ** 0.5 + 1e-9
    assert (surprise.mean() - q.entropy_of_log()).abs() < 5 * error
    # the twin: the entropy of z itself is another
    assert ((-q.log_prob(draws)).mean() - q.entropy_of_log()).abs() > 5 * error


def test_far_in_a_tail_the_log_is_exponential_from_the_near_end() -> None:
    q = TruncatedLogNormal(-60.0, 0.1, -20.0, 2.0)
    excess = q.sample((100_000,)).log() + 20
    rate = 40 / 0.1**2
    assert float(excess.mean() * rate) == pytest.approx(1, abs=0.02)
    assert float(excess.std() * rate) == pytest.approx(1, abs=0.03)


def test_wide_truncated_log_normal_becomes_log_uniform() -> None:
    q, p = TruncatedLogNormal(-3.0, 1e5, -4.0, 1.0), TruncatedLogUniform(-4.0, 1.0)
    z = p.sample((10,))
    torch.testing.assert_close(q.log_prob(z), p.log_prob(z))
    torch.testing.assert_close(q.mean, p.mean)
    torch.testing.assert_close(q.variance, p.variance)


@pytest.mark.parametrize(
    "gate",
    [TruncatedLogUniform(-2.0, 1.0), TruncatedLogNormal(0.0, 1.0, -2.0, 1.0)],
    ids=str,
)
def test_expansion_and_event_dims_keep_density_and_kind(gate: Gate) -> None:
    each = gate.expand([3, 4])
    assert type(each) is type(gate) and each.batch_shape == (3, 4)
    assert each.mean.shape == each.variance.shape == (3, 4)
    z = each.sample((5,))
    assert z.shape == (5, 3, 4) and z.unique().numel() == 60
    torch.testing.assert_close(each.log_prob(z), gate.log_prob(z))
    joint = each.to_event(1)
    assert joint.event_dim == 1 and joint.batch_shape == (3,)
    torch.testing.assert_close(joint.log_prob(z), gate.log_prob(z).sum(-1))


def test_support_maps_to_the_real_line_and_back() -> None:
    gate = TruncatedLogUniform(torch.tensor([-2.0, 0.0]), torch.tensor([1.0, 3.0]))
    z = gate.sample((100,))
    transform = transform_to(gate.support)
    torch.testing.assert_close(transform(transform.inv(z)), z)


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_density_is_zero_off_the_support(kind: str) -> None:
    z = torch.tensor([math.exp(-2.1), 0.5, math.exp(1.1)])
    for validate in (False, True):
        gate: Gate = (
            TruncatedLogUniform(-2.0, 1.0, validate_args=validate)
            if kind == "uniform"
            else TruncatedLogNormal(0.0, 1.0, -2.0, 1.0, validate_args=validate)
        )
        if validate:
            with pytest.raises(ValueError, match="to be within the support"):
                gate.log_prob(z)
        else:
            assert gate.log_prob(z).isfinite().tolist() == [False, True, False]
            assert np.isneginf(gate.log_prob(z)[[0, 2]].numpy()).all()


@pytest.mark.parametrize("low, high", [(1.0, 0.0), (0.0, 0.0), (-math.inf, 0.0)])
def test_bounds_out_of_order_or_infinite_are_refused(low: float, high: float) -> None:
    message = rf"got low={low} and high={high}; expected finite low < high"
    with pytest.raises(ValueError, match=f"TruncatedLogUniform {message}"):
        TruncatedLogUniform(low, high)
    with pytest.raises(ValueError, match=f"TruncatedLogNormal {message}"):
        TruncatedLogNormal(0.0, 1.0, low, high)
    TruncatedLogUniform(low, high, validate_args=False)


def test_negative_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale"):
        TruncatedLogNormal(0.0, -1.0, -2.0, 1.0)
