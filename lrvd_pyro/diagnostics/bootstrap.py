"""Sums and areas over many weighted copies of a data set at once."""

import torch
from torch import Tensor


def auroc(weights: Tensor, positive: Tensor, signal: Tensor) -> Tensor:
    """Probability that a positive has the greater signal, ties counting half."""
    values, group = signal.unique(return_inverse=True)
    high = grouped(weights * positive, group, len(values))
    low = grouped(weights * (1 - positive), group, len(values))
    pairs = (high * (low.cumsum(1) - low / 2)).sum(1)
    return pairs / (high.sum(1) * low.sum(1))


def sum_of_first(weights: Tensor, x: Tensor, key: Tensor, counts: Tensor) -> Tensor:
    """The sum of ``x`` over the first ``counts`` data in the order of ``key``.

    Linear between data, and within those of one key. ``b x n`` weights and k counts
    give ``b x k``.
    """
    values, group = key.unique(return_inverse=True)
    mass = grouped(weights, group, len(values)).cumsum(1)
    total = grouped(weights * x, group, len(values)).cumsum(1)
    mass, total = (torch.nn.functional.pad(t, (1, 0)) for t in (mass, total))
    end = torch.searchsorted(mass, counts.expand(len(mass), -1).contiguous())
    end = end.clamp(min=1, max=len(values))
    left, width = mass.gather(1, end - 1), mass.gather(1, end) - mass.gather(1, end - 1)
    before, after = total.gather(1, end - 1), total.gather(1, end)
    return before + (after - before) * (counts - left) / width.clamp(min=1)


def grouped(x: Tensor, group: Tensor, size: int) -> Tensor:
    """The sums over the columns of ``b x n`` in each group, ``b x size``."""
    return x.new_zeros(len(x), size).index_add_(1, group, x)


def resampled(number: int, n: int, generator: torch.Generator) -> Tensor:
    """How often each of n data comes in each resample, ``number x n``."""
    picks = torch.randint(n, (number, n), generator=generator)
    counts = torch.zeros(number, n, dtype=torch.double)
    return counts.scatter_add_(1, picks, torch.ones_like(counts))
