"""Simulation-based calibration: whether posterior draws are those of the posterior."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro.testing.goodness_of_fit import FAILURE_RATE

__all__ = ["assert_uniform_ranks", "sbc_ranks"]


def sbc_ranks(
    simulate: Callable[[], tuple[Tensor, Any]],
    fit: Callable[[Any], Tensor],
    num_simulations: int,
    num_draws: int,
) -> Tensor:
    """Rank true latents among posterior draws: simulation-based calibration.

    If ``simulate`` is the model and ``fit`` its exact posterior, each rank is uniform
    on 0 .. S: see `assert_uniform_ranks`.

    Wrong for draws that depend on each other: thin those of a Markov chain first.

    Example::

        assert_uniform_ranks(sbc_ranks(simulate, fit, 200, 63), num_draws=63)

    Args:
        simulate: A function that draws latents, ``size``, from the prior, and data
            given the latents.
        fit: A function from data to draws of the posterior, ``S x size``.
        num_simulations: The number of rows.
        num_draws: The number of draws S.

    Returns:
        How many draws lie below the truth, ``num_simulations x size``.

    Raises:
        ValueError: If ``fit`` gives draws of another shape.

    Source: Talts, Betancourt, Simpson, Vehtari and Gelman (2018, arXiv 1804.06788),
    algorithm 1.
    """
    ranks = []
    for _ in range(num_simulations):
        latents, data = simulate()
        draws, shape = fit(data), (num_draws, *latents.shape)
        if draws.shape != shape:
            raise ValueError(
                f"fit drew {tuple(draws.shape)}; expected S x size, {shape}"
            )
        ranks.append((draws < latents).sum(0))
    return torch.stack(ranks)


def assert_uniform_ranks(
    ranks: Tensor, num_draws: int, *, failure_rate: float = FAILURE_RATE
) -> None:
    """Assert that the ranks of `sbc_ranks` are uniform: one chi-squared test a latent.

    About 20 ranks are expected in each bin. 200 simulations find a scale 0.6 times the
    right one, or a mean off by one standard deviation. A scale of 0.9 takes thousands.

    Args:
        ranks: The ranks, ``num_simulations x size``.
        num_draws: The number of draws S.
        failure_rate: The probability of failing by chance, for all latents together.

    Raises:
        AssertionError: With the latent, the p-value and the counts.

    >>> assert_uniform_ranks(torch.arange(64).repeat(5)[:, None], num_draws=63)
    """
    count, size = ranks.shape
    bins = max(2, min(num_draws + 1, count // 20))
    # The bin of each rank. S + 1 ranks need not divide evenly, so bins expect unequal
    # counts.
    bin_of = torch.arange(num_draws + 1, device=ranks.device) * bins // (num_draws + 1)
    expected = bin_of.bincount().double() * count / (num_draws + 1)
    for latent, column in enumerate(ranks.unbind(1)):
        counts = bin_of[column].bincount(minlength=bins)
        statistic = ((counts - expected).square() / expected).sum()
        freedom = statistic.new_tensor(bins - 1)
        p_value = float(torch.special.gammaincc(freedom / 2, statistic / 2))
        assert p_value >= failure_rate / size, (
            f"latent {latent}: its ranks are not uniform, p = {p_value:.2g}, counts "
            f"{counts.tolist()} over {bins} bins"
        )
