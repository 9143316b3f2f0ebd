"""ECE as a sum of gaps over bins, and an interval that does not share its bias."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lrvd_pyro.diagnostics.bootstrap import grouped, sum_of_first
from lrvd_pyro.diagnostics.scores import BINS, calibration_bins

__all__ = ["GapSums", "calibrated_errors", "gap_sums"]

_HALVINGS = 30  # of the interval in which a share is sought


class GapSums(NamedTuple):
    """Sums of confidence minus accuracy over bins, for b resamples.

    Attributes:
        gaps: Of the gaps in the resample, per datum of it, ``b x K``.
        means: Of the mean gaps that the data themselves have, bin by bin, ``b x K``.
    """

    gaps: Tensor
    means: Tensor

    @classmethod
    def joined(cls, parts: Iterable["GapSums"]) -> "GapSums":
        """The resamples of several chunks."""
        return cls(*map(torch.cat, zip(*parts)))

    def errors(self, share: float = 1.0) -> Tensor:
        """The calibration error of each resample, ``b``.

        Args:
            share: How much is left of every bin's gap, 1 for all of it. At 0 the
                resamples come from a calibrated classifier with the noise of the data.
        """
        return (self.gaps - (1 - share) * self.means).abs().sum(1)

    def interval(self, value: float, calibrated: Tensor) -> tuple[float, float]:
        """A 95% interval of the population's calibration error.

        Noise adds to a sum of absolute gaps, and resampling adds it a second time. So
        the ends are found by test inversion: an error of ``share * value`` belongs to
        the interval unless the observed value lies in a 2.5% tail of `errors(share)`.
        The interval holds the value itself. It reaches 0 if a calibrated classifier of
        these confidences would show such a value.

        Wrong where the gaps of the population differ in shape from those of the data:
        one number scales all bins.

        Args:
            value: The calibration error of the data.
            calibrated: Errors of a calibrated classifier, from `calibrated_errors`.

        Source: Carpenter (1999, J. R. Stat. Soc. B 61, 159-172).
        """
        if value == 0:
            return 0.0, 0.0
        low, high = (self._share(value, tail) * value for tail in (0.975, 0.025))
        # Data without an error have no noise to resample.
        if float(calibrated.quantile(0.975)) >= value:
            low = 0.0
        return min(low, value), max(high, value)

    def _share(self, value: float, tail: float) -> float:
        """The share at which this quantile of the errors is the value."""
        below, above = 0.0, 1 / value  # an error is at most 1
        if float(self.errors(below).quantile(tail)) >= value:
            return below
        for _ in range(_HALVINGS):
            middle = (below + above) / 2
            if float(self.errors(middle).quantile(tail)) < value:
                below = middle
            else:
                above = middle
        return above


def gap_sums(confidence: Tensor, hit: Tensor, weights: Tensor) -> dict[str, GapSums]:
    """The sums behind ``ece`` and ``adaptive_ece``, for b resamples.

    Args:
        confidence: ``n``.
        hit: 1 where the prediction is right, ``n``.
        weights: Counts, ``b x n``.
    """
    n, gap = len(confidence), confidence - hit
    equal_mass = torch.empty(n, dtype=torch.long)
    equal_mass[confidence.argsort()] = torch.arange(n) * BINS // n
    _, ties = confidence.unique(return_inverse=True)
    binned = calibration_bins(confidence)
    means = _mean_of(gap, binned), _mean_of(_mean_of(gap, equal_mass), ties)
    over = [_over_bins(confidence, x, weights) for x in (gap, *means)]
    return {
        "ece": GapSums(over[0][0], over[1][0]),
        "adaptive_ece": GapSums(over[0][1], over[2][1]),
    }


def calibrated_errors(
    confidence: Tensor, number: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Both errors of a calibrated classifier on data of these confidences.

    Args:
        confidence: ``n``.
        number: How many sets of labels to draw.
        generator: The random state of the labels.

    Returns:
        ``number`` each.
    """
    p = confidence.expand(number, -1)
    over = _over_bins(confidence, p - torch.bernoulli(p, generator=generator), None)
    names = "ece", "adaptive_ece"
    return {name: gaps.abs().sum(1) for name, gaps in zip(names, over)}


def _over_bins(
    confidence: Tensor, gap: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums of gaps over bins of equal width, and of equal mass, per datum.

    Args:
        confidence: ``n``.
        gap: ``n``, or ``b x n``.
        weights: Counts, ``b x n``; None counts each datum once.
    """
    n = len(confidence)
    weights = torch.ones_like(gap) if weights is None else weights
    edges = torch.linspace(0, n, BINS + 1, dtype=torch.double)
    # A confidence of exactly 1 lies beyond the last edge: it has a bin of its own.
    fixed = grouped(weights * gap, calibration_bins(confidence), BINS + 1)
    moving = sum_of_first(weights, gap, confidence, edges).diff(dim=1)
    return fixed / n, moving / n


def _mean_of(x: Tensor, group: Tensor) -> Tensor:
    """The mean of the group that each datum belongs to, ``n``."""
    size = int(group.max()) + 1
    both = grouped(torch.stack([x, torch.ones_like(x)]), group, size)
    return (both[0] / both[1])[group]
