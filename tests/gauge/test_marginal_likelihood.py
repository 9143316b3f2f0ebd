"""The evidence of a linear-Gaussian model, where all of it is known exactly."""

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from lrvd_pyro.gauge import Evidence


def problem(size: int, outputs: int = 1) -> tuple[Tensor, Tensor]:
    """A design ``40 x K x P`` and data, ``40 x K``, of unit noise."""
    torch.manual_seed(0)
    # Unequal and correlated columns: the Hessian is far from diagonal.
    mixing = torch.randn(size, size) * torch.linspace(0.1, 1, size)
    design = torch.randn(40, outputs, size) @ mixing / 3
    y = design @ torch.randn(size) + torch.randn(40, outputs)
    return design.double(), y.double()


def best_fit(design: Tensor, y: Tensor) -> Tensor:
    """The weights of greatest likelihood; of those the shortest."""
    weights: Tensor = torch.linalg.pinv(design.flatten(0, 1)) @ y.flatten()
    return weights


def found(design: Tensor, weights: Tensor, scale: float = 1.0) -> Evidence:
    return Evidence(
        scale * design.square().sum((0, 1)), None, design, design @ weights, scale
    )


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("size", [6, 100])  # of parameters; there are 40 examples
def test_it_is_greatest_where_the_exact_marginal_likelihood_is(
    size: int, outputs: int
) -> None:
    design, y = problem(size, outputs)
    X = design.flatten(0, 1)
    grid = torch.logspace(-4, 4, 4001).double()
    values, vectors = torch.linalg.eigh(X @ X.T)
    spread = 1 + values[:, None] / grid
    whitened = (vectors.T @ y.flatten())[:, None] ** 2 / spread
    best = grid[(-0.5 * (whitened + spread.log()).sum(0)).argmax()]
    its = found(design, best_fit(design, y))
    assert its.precision == pytest.approx(float(best), rel=0.01)
    exact = (values / (values + its.precision)).sum()
    assert its.gamma == pytest.approx(float(exact))
    # the same from torch's own density, at one delta
    covariance = torch.eye(len(X)).double() + X @ X.T / best
    law = MultivariateNormal(torch.zeros(len(X)).double(), covariance)
    i = int((grid - best).abs().argmin())
    direct = -0.5 * (whitened + spread.log()).sum(0)[i]
    normal = -0.5 * len(X) * torch.log(torch.tensor(2 * torch.pi).double())
    torch.testing.assert_close(law.log_prob(y.flatten()), direct + normal)


def test_delta_balances_the_size_of_the_posterior_mean_and_gamma() -> None:
    design, y = problem(100)
    unseen = torch.linalg.svd(design.flatten(0, 1)).Vh[-1]
    weights = best_fit(design, y) + 10 * unseen
    its = found(design, weights)
    H = design.flatten(0, 1).T @ design.flatten(0, 1)
    delta = its.precision
    shrunk = torch.linalg.solve(H + delta * torch.eye(100).double(), H @ weights)
    assert delta * float(shrunk.square().sum()) == pytest.approx(its.gamma, rel=1e-3)
    # The twin: MacKay's fixed point takes the weights themselves for that mean.
    assert abs(delta * float(weights.square().sum()) - its.gamma) > 0.2 * its.gamma


def test_what_no_example_sees_of_the_weights_makes_no_difference() -> None:
    """As the part of A that it started with, or where an optimizer has drifted."""
    design, y = problem(100)
    weights = best_fit(design, y)
    unseen = torch.linalg.svd(design.flatten(0, 1)).Vh[-1]
    assert (design @ unseen).abs().max() < 1e-9
    moved = found(design, weights + 50 * unseen)
    assert moved.precision == pytest.approx(found(design, weights).precision)


@pytest.mark.parametrize("outputs", [1, 2])
def test_gamma_loo_is_the_cost_of_noise_on_examples_that_are_left_out(
    outputs: int,
) -> None:
    design, y = problem(100, outputs)
    its = found(design, best_fit(design, y))
    total = inside = 0.0
    for n in range(40):
        for keep in (torch.arange(40) != n, torch.ones(40, dtype=torch.bool)):
            X = design[keep].flatten(0, 1)
            precision = X.T @ X + its.precision * torch.eye(100).double()
            variance = design[n] @ torch.linalg.solve(precision, design[n].T)
            if keep.all():
                inside += float(variance.trace())
            else:
                total += float(variance.trace())
    assert its.gamma_loo == pytest.approx(total)
    assert its.gamma == pytest.approx(inside)
    assert total > 1.2 * inside  # the twin: noise where the example was trained on


def test_a_part_of_the_data_stands_for_all_of_it() -> None:
    design, y = problem(6)
    weights = best_fit(design, y)
    twice = found(torch.cat([design, design]), weights)
    part = found(design, weights, scale=2.0)
    for name in ("precision", "gamma", "gamma_loo"):
        value = getattr(part, name)
        assert value == pytest.approx(getattr(twice, name), rel=1e-6)
    # the twin: N/n twice
    assert part.gamma != pytest.approx(
        found(design, weights, scale=4.0).gamma, rel=0.01
    )


def test_a_part_that_stands_for_more_examples_costs_too_little() -> None:
    """An example left out is still there in the copies that it stands for."""
    design, y = problem(100)
    whole = found(design, best_fit(design, y))
    part = found(design[:20], best_fit(design[:20], y[:20]), scale=2.0)
    assert part.gamma_loo - part.gamma < 0.7 * (whole.gamma_loo - whole.gamma)


def test_evidence_without_a_maximum_is_refused() -> None:
    design, y = problem(6)
    weights = best_fit(design, y)
    with pytest.raises(
        ValueError, match="no maximum: it rises until.*certain of every"
    ):
        _ = found(design, 0.001 * weights).precision
    with pytest.raises(ValueError, match="no maximum: the largest eigenvalue.* is 0;"):
        _ = found(0 * design, weights).precision
    for wrong in (design * float("nan"), design / 0):
        for name in ("precision", "gamma", "gamma_loo"):
            with pytest.raises(ValueError, match="A and B are not finite; look for Na"):
                getattr(found(wrong, weights), name)


def test_more_examples_than_there_are_data_have_no_cost_left_out() -> None:
    design, y = problem(6)
    weights = best_fit(design, y)
    part = found(design[:3], weights, scale=0.1)
    with pytest.raises(
        ValueError, match=r"leverage of .*less than 1.*num_data=len\(tr"
    ):
        _ = part.gamma_loo
    assert found(design[:3], weights, scale=1.0).gamma_loo > 0


def test_signed_sums_of_roots_have_no_evidence() -> None:
    """Their matrix has other eigenvalues: the rank is n, and not n K."""
    design, y = problem(6, outputs=2)
    diagonal = design.square().sum((0, 1))
    its = Evidence(diagonal, None, None, (design @ best_fit(design, y))[:, :1], 1.0)
    for name in ("precision", "gamma", "gamma_loo"):
        with pytest.raises(ValueError, match=r"evidence\(..., sampled=False\)"):
            getattr(its, name)


def test_a_sketch_too_short_for_gamma_is_told_of() -> None:
    design, y = problem(100)
    slopes = design @ best_fit(design, y)
    diagonal = design.square().sum((0, 1))
    signs = torch.randint(0, 2, (100,)) * 2 - 1
    folded = (design * signs).unflatten(2, (2, 50)).sum(2)
    its = Evidence(diagonal, None, folded, slopes, 1.0)
    with pytest.warns(UserWarning, match="gamma_loo may be wrong by .* a sketch of 50"):
        _ = its.gamma_loo
    _ = found(design, best_fit(design, y)).gamma_loo  # no warning
