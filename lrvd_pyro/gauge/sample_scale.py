"""The largest noise that draws bear, where the network is not linear in its adapter."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrvd_pyro.batches import Batch, batch_size, without_labels
from lrvd_pyro.likelihoods.base import Contrasts
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.models.inputs import with_rows
from lrvd_pyro.predictive.fan_out import FanOut

__all__ = ["effect_of_draws", "sample_scale", "spread_examples"]

_Part = dict[str, Any]
_ROWS, _PARTS = 4, 8  # examples of a part; of these, as many to twice as many
_FEW, _PAIRS, _MOST_PAIRS, _AT_ONCE = 8, 32, 128, 8
_MARGIN = 2.0  # standard errors that the bound must hold by
_TOLERATED = 0.1  # the standard error beyond which there are more pairs
_TIGHT, _TRIES = 0.9, 24  # how near the bound is enough
_LEAP, _SMALLEST = 1024, 1e-12  # of a step down, and of the search


class _DrawEffect(NamedTuple):
    """What draws do to the contrasts, on average over examples and contrasts.

    Attributes:
        shift: The square of how far they move the mean, without bias.
        noise: The variance about it.
        error: The standard error of ``shift - noise``.
    """

    shift: float
    noise: float
    error: float

    def excess(self, margin: float) -> float:
        """The squared shift, and a margin of standard errors, over the noise."""
        return (self.shift + margin * self.error) / self.noise


def sample_scale(
    model: RankModel,
    mean: Tensor,
    variance: Tensor,
    batches: Iterable[Batch],
    most: float,
    seed: int = 0,
) -> float:
    """The largest factor s on the variances that draws bear, at most ``most``.

    Draws ``z = m + sqrt(s V) e`` move the mean of the contrasts c, which the linearized
    predictive holds at c(m): the shift grows as s, the noise as sqrt(s). The factor is
    the one at which the two are equal on training data, ``mean |E c(z) - c(m)|^2 = mean
    Var c(z)``. Beyond it, averages of draws are those of another network.

    The bound holds by two standard errors over the draws. Eight pairs of these find
    roughly where; then there are 32, or 128, until one standard error is a tenth
    of the noise. The factor found is a fifth below the exact one in the mean. For a
    network that sees a single direction of the noise, which is worst, it was between
    half of it and a third more.

    Args:
        model: The model.
        mean: m, what it binds at the posterior mean, (R,) or (K,).
        variance: V, the variances of the noise to scale, of the same shape.
        batches: Training batches; 32 to 64 examples, spread over them, are used.
        most: The scale by evidence.
        seed: Of the draws.

    Raises:
        ValueError: If there is no batch, predictions are not finite, the noise moves
            none of them, or its shift exceeds it at every scale.

    Source: derived here.
    """
    parts = spread_examples(batches)
    pairs, scale = _FEW, most

    def effect(scale: float) -> _DrawEffect | None:
        return effect_of_draws(model, mean, scale * variance, parts, pairs, seed)

    def excess(scale: float) -> float:
        found = effect(scale)
        # Of a few pairs the error of the noise alone would exceed the bound.
        margin = _MARGIN if pairs >= _PAIRS else 0.0
        return math.inf if found is None else found.excess(margin)

    while True:
        scale = _largest(excess, scale, most)
        # At the whole scale the bound holds by the error that there is.
        if pairs >= _PAIRS and (scale == most or pairs == _MOST_PAIRS):
            return scale
        found = effect(scale) if pairs >= _PAIRS else None
        if found and found.error <= _TOLERATED * found.noise:
            return scale
        pairs *= 4


def effect_of_draws(
    model: RankModel,
    mean: Tensor,
    variance: Tensor,
    parts: Iterable[_Part],
    pairs: int,
    seed: int = 0,
) -> _DrawEffect | None:
    """What draws of a variance do to the contrasts; None where these are not finite.

    Opposite draws tell shift and noise apart: half their difference is noise alone, and
    half their sum, less c(m), shift alone, up to third order. Products of the shifts of
    two pairs have the squared shift as their mean; the square of one has its noise too.

    Args:
        model: The model.
        mean: What it binds at the posterior mean, (R,) or (K,).
        variance: The variances of the draws, of the same shape.
        parts: Batches without labels.
        pairs: The number of opposite draws, two at least.
        seed: Of the draws, the same for all variances, so that the excess is smooth.

    Raises:
        ValueError: If predictions at the mean are not finite, or the noise moves none.

    Source: opposite draws, Hammersley and Morton (1956); unbiased squares, Hoeffding
    (1948).
    """
    source, parts = torch.Generator().manual_seed(seed), list(parts)
    shifts, noises = [], []
    with evaluating(model), torch.no_grad():
        center = _contrasts(model, mean[None], parts)
        if not center.isfinite().all():
            raise ValueError(
                "predictions at the posterior mean are not finite; look for NaN in the "
                "adapter and in the batches"
            )
        for begin in range(0, pairs, _AT_ONCE):
            size = min(_AT_ONCE, pairs - begin), len(mean)
            step = torch.randn(size, generator=source, dtype=torch.float32).to(mean)
            step = step * variance.to(mean).sqrt()
            drawn = _contrasts(model, torch.cat([mean + step, mean - step]), parts)
            plus, minus = drawn.chunk(2)
            shifts.append((plus + minus) / 2 - center)
            noises.append(((plus - minus) / 2).square().mean(1))
    shift, noise = torch.cat(shifts), torch.cat(noises)
    if not (shift.isfinite().all() and noise.isfinite().all()):
        return None
    if not noise.any():
        raise ValueError(
            "the noise moves no prediction of these batches; pass the batches that the "
            "adapter was trained on"
        )
    own = shift.square().sum(1)
    others = (shift @ shift.sum(0) - own) / (pairs - 1) / shift.shape[1]
    error = (2 * others - noise).std() / math.sqrt(pairs)
    return _DrawEffect(float(others.mean()), float(noise.mean()), float(error))


def spread_examples(batches: Iterable[Batch]) -> list[_Part]:
    """Some 50 examples from all over the batches, as small batches without labels.

    Raises:
        ValueError: If there is no batch.
    """
    kept: list[tuple[int, _Part]] = []
    every, number = 1, 0
    for batch in batches:
        size, inputs = batch_size(batch), without_labels(batch)
        for begin in range(0, size, _ROWS):
            if number % every == 0:
                # a copy, since a view would keep the whole batch in memory
                end = begin + _ROWS
                part = with_rows(inputs, size, lambda t: t[begin:end].clone())  # noqa: B023
                kept.append((number, part))
            if len(kept) > 2 * _PARTS:
                every *= 2
                kept = [each for each in kept if each[0] % every == 0]
            number += 1
    if not kept:
        raise ValueError(
            "got no batches the second time; expected the training set, which can be "
            "read again: a list or a DataLoader"
        )
    return [part for _, part in kept]


def _largest(excess_at: Callable[[float], float], start: float, most: float) -> float:
    """The largest scale, from ``start`` on, at which the excess is within 1."""
    low, high, scale = 0.0, math.inf, start
    for _ in range(_TRIES):
        excess = excess_at(scale)
        if excess <= 1 and (scale == most or excess >= _TIGHT):
            return scale
        low, high = (scale, high) if excess <= 1 else (low, scale)
        if low > 0.95 * high:
            return low
        # The excess grows as the scale, where the network is smooth.
        guess = min(0.95 * scale / excess, most) if excess > 0 else most
        least = max(low, min(high, most) / _LEAP)
        if not least < guess < high:
            guess = math.sqrt(least * min(high, most))
        if guess < _SMALLEST * most:
            break
        scale = guess
    if low == 0:
        raise ValueError(
            f"draws move the mean of the predictions by more than they spread, from a "
            f"noise of {most:.3g} times the guide's own down to {scale:.3g}; the "
            f"network is not smooth in its adapter at this precision: take float32"
        )
    return low


def _contrasts(model: RankModel, values: Tensor, parts: Iterable[_Part]) -> Tensor:
    """What the likelihood looks at under each value, ``S x F``, over all examples."""
    run, likelihood = FanOut(model, values, None), model.likelihood
    drawn = [run(part) for part in parts]
    if isinstance(likelihood, Contrasts):
        drawn = [torch.stack([likelihood.contrasts(y) for y in each]) for each in drawn]
    # Without contrasts, batches may differ in length.
    return torch.cat([each.flatten(1).double() for each in drawn], 1)
