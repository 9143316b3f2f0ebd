"""Ranks are uniform under the exact posterior, and not under a wrong one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lrvd_pyro.testing import assert_uniform_ranks, sbc_ranks


def conjugate(shift: float = 0.0, factor: float = 1.0) -> Tensor:
    """Ranks for z ~ Normal(0, 1), x ~ Normal(z, 1), the posterior changed or not."""

    def simulate() -> tuple[Tensor, Tensor]:
        z = torch.randn(2)
        return z, z + torch.randn(2)

    def fit(x: Tensor) -> Tensor:
        sd = 0.5**0.5
        return x / 2 + sd * (shift + factor * torch.randn(49, 2))

    return sbc_ranks(simulate, fit, num_simulations=500, num_draws=49)


def test_ranks_of_the_exact_posterior_are_uniform() -> None:
    ranks = conjugate()
    assert ranks.shape == (500, 2) and ranks.min() == 0 and ranks.max() == 49
    assert_uniform_ranks(ranks, 49)


@pytest.mark.parametrize("wrong", [{"shift": 0.5}, {"factor": 0.6}, {"factor": 1.7}])
def test_ranks_of_a_wrong_posterior_are_not_uniform(wrong: Any) -> None:
    with pytest.raises(AssertionError, match="latent 0: its ranks are not uniform"):
        assert_uniform_ranks(conjugate(**wrong), 49)


def test_uniform_ranks_fail_by_chance_as_often_as_they_should() -> None:
    failures = 0
    for _ in range(1000):
        try:
            assert_uniform_ranks(torch.randint(0, 48, (200, 3)), 47, failure_rate=0.1)
        except AssertionError:
            failures += 1
    assert 60 < failures < 140


def test_sbc_wants_as_many_draws_as_it_was_told() -> None:
    with pytest.raises(ValueError, match=r"fit drew \(3, 2\); expected .*\(4, 2\)"):
        sbc_ranks(lambda: (torch.zeros(2), 0), lambda _: torch.zeros(3, 2), 1, 4)
