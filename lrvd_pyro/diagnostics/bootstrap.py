"""Bootstrap: sums and areas over many resamples of a data set at once.

A resample is a row of counts, how often each datum comes in it. So b resamples of n
data are a ``b x n`` matrix of weights, and each sum over them is one matrix product.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Interval", "auroc", "grouped", "resampled", "sum_of_first"]


class Interval(NamedTuple):
    """A value and its 95% bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


def auroc(weights: Tensor, positive: Tensor, signal: Tensor) -> Tensor:
    """The probability that a positive has a greater signal than a negative.

    Ties count one half.

    Args:
        weights: Counts, ``b x n``.
        positive: 1 for positives and 0 for negatives, ``n``.
        signal: ``n``.

    Returns:
        ``b``; NaN for a resample without a positive or without a negative.
    """
    values, group = signal.unique(return_inverse=True)
    high = grouped(weights * positive, group, len(values))
    low = grouped(weights * (1 - positive), group, len(values))
    # Pairs whose negative lies below, and half of those that tie.
    pairs = (high * (low.cumsum(1) - low / 2)).sum(1)
    return pairs / (high.sum(1) * low.sum(1))


def sum_of_first(weights: Tensor, x: Tensor, key: Tensor, counts: Tensor) -> Tensor:
    """The sum of ``x`` over the first data in the order of ``key``.

    It is linear between data, and among data of one key.

    Args:
        weights: Counts, ``b x n``.
        x: ``n``.
        key: ``n``.
        counts: How many data to sum over, ``k``.

    Returns:
        ``b x k``.
    """
    # One group per key: its data come in random order, and the line through the group
    # is the mean over these orders.
    values, group = key.unique(return_inverse=True)
    mass = grouped(weights, group, len(values)).cumsum(1)
    total = grouped(weights * x, group, len(values)).cumsum(1)
    mass, total = (torch.nn.functional.pad(t, (1, 0)) for t in (mass, total))
    end = torch.searchsorted(mass, counts.expand(len(mass), -1).contiguous())
    end = end.clamp(min=1, max=len(values))
    left, width = mass.gather(1, end - 1), mass.gather(1, end) - mass.gather(1, end - 1)
    before, after = total.gather(1, end - 1), total.gather(1, end)
    # The width is a count; it is 0 where a resample has no datum of that key.
    return before + (after - before) * (counts - left) / width.clamp(min=1)


def grouped(x: Tensor, group: Tensor, size: int) -> Tensor:
    """The sums over the columns of each group.

    Args:
        x: ``b x n``.
        group: The number of each column's group, ``n``.
        size: The number of groups.

    Returns:
        ``b x size``.
    """
    return x.new_zeros(len(x), size).index_add_(1, group, x)


def resampled(number: int, n: int, generator: torch.Generator) -> Tensor:
    """Draw resamples of n data with replacement, as counts, ``number x n``."""
    picks = torch.randint(n, (number, n), generator=generator)
    counts = torch.zeros(number, n, dtype=torch.double)
    return counts.scatter_add_(1, picks, torch.ones_like(counts))
