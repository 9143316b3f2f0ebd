"""Goodness of fit passes on a right density, and fails on a wrong one."""

from typing import Any

import pytest
import torch
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro.testing import assert_goodness_of_fit


class Misstated(dist.Normal):
    """A normal distribution whose density has another scale."""

    def log_prob(self, value: Tensor) -> Tensor:
        return dist.Normal(self.loc, 1.1 * self.scale).log_prob(value)


class Unnormalized(dist.Normal):
    """A normal distribution whose density integrates to 0.95."""

    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) - 0.05


@pytest.mark.parametrize(
    "right",
    [
        dist.Normal(0.0, 1.0),
        dist.HalfCauchy(torch.tensor(2.0)),
        dist.LogNormal(0.0, 3.0),
        dist.Gamma(torch.tensor(0.1), 1.0),
        dist.Normal(torch.arange(4.0), 0.5).to_event(1),
        dist.MultivariateNormal(torch.zeros(3), 0.3 * torch.eye(3) + 0.7),
    ],
)
def test_goodness_of_fit_passes_on_right_densities(right: Any) -> None:
    assert_goodness_of_fit(right)


@pytest.mark.parametrize("family", [Misstated, Unnormalized])
def test_goodness_of_fit_fails_on_wrong_densities(family: Any) -> None:
    with pytest.raises(AssertionError, match="element 0: samples and log_prob"):
        assert_goodness_of_fit(family(0.0, 1.0))
    with pytest.raises(AssertionError, match="element 0: samples and log_prob"):
        assert_goodness_of_fit(family(torch.zeros(4), 1.0).to_event(1))


@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_goodness_of_fit_fails_on_grossly_wrong_densities(factor: float) -> None:
    class Gross(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return dist.Normal(self.loc, factor * self.scale).log_prob(value)

    with pytest.raises(AssertionError, match="samples and log_prob"):
        assert_goodness_of_fit(Gross(0.0, 1.0))


def test_goodness_of_fit_fails_on_a_density_without_the_correlation() -> None:
    class Uncorrelated(dist.MultivariateNormal):
        def log_prob(self, value: Tensor) -> Tensor:
            sd = self.covariance_matrix.diag().sqrt()
            return dist.Normal(self.loc, sd).to_event(1).log_prob(value)

    covariance = 0.3 * torch.eye(3) + 0.7
    with pytest.raises(AssertionError, match="samples and log_prob"):
        assert_goodness_of_fit(Uncorrelated(torch.zeros(3), covariance))


def test_goodness_of_fit_fails_by_chance_as_often_as_it_says() -> None:
    failures = 0
    for _ in range(1000):
        try:
            assert_goodness_of_fit(dist.Normal(0.0, 1.0), 1000, failure_rate=0.1)
        except AssertionError:
            failures += 1
    assert 50 < failures < 130
