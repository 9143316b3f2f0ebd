"""The largest noise that draws bear, where the network is not linear in its adapter."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro.batches import Batch, batch_size, without_labels
from lrvd_pyro.likelihoods.base import Contrasts
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.predictive.draws import seeded
from lrvd_pyro.predictive.fan_out import FanOut

__all__ = ["sample_scale"]

_EXAMPLES, _PAIRS = 128, 4
_HALVINGS, _STEPS = 10, 7  # the scale is found within a factor of 1.06


@torch.no_grad()
def sample_scale(
    model: RankModel,
    mean: Tensor,
    variance: Tensor,
    batches: Iterable[Batch],
    most: float,
) -> float:
    """The largest factor s on the variances that draws bear, at most ``most``.

    Draws ``z = m + sqrt(s V) e`` move the mean of the contrasts c, which the linearized
    predictive holds at c(m): the shift grows as s, the noise as sqrt(s). The factor is
    the one at which the two are equal on training data, ``mean |E c(z) - c(m)|^2 = mean
    Var c(z)``. Beyond it, averages of draws are those of another network.

    Opposite draws tell the two apart: half their difference is noise alone, and half
    their sum, less c(m), shift alone, up to third order. The squared shift is unbiased.

    Args:
        model: The model.
        mean: m, what it binds at the posterior mean, (R,) or (K,).
        variance: V, the variances of the noise to scale, of the same shape.
        batches: Training batches; the first 128 examples are used.
        most: The scale by evidence.

    Source: derived here; opposite draws, Hammersley and Morton (1956).
    """
    some, count = [], 0
    for batch in batches:
        some.append(without_labels(batch))
        count += batch_size(batch)
        if count >= _EXAMPLES:
            break
    with evaluating(model), seeded(0):
        # The same draws at all scales, so that the ratio is smooth.
        noise = torch.randn(_PAIRS, len(mean)).to(mean) * variance.sqrt()
        center = _contrasts(model, mean[None], some)[0]

        def excess(log_scale: float) -> float:
            """Squared shift over squared noise."""
            step = math.exp(0.5 * log_scale) * noise
            drawn = _contrasts(model, torch.cat([mean + step, mean - step]), some)
            plus, minus = drawn.chunk(2)
            shifts = (plus + minus) / 2 - center
            total = shifts.sum(0).square() - shifts.square().sum(0)
            shift = total.mean() / (_PAIRS * (_PAIRS - 1))
            return float(shift / ((plus - minus) / 2).square().mean())

        high = math.log(most)
        low = high - _HALVINGS * math.log(2)
        if excess(high) <= 1:
            return most
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) <= 1 else (low, middle)
    return math.exp(low)


def _contrasts(
    model: RankModel, values: Tensor, batches: Iterable[dict[str, Any]]
) -> Tensor:
    """What the likelihood looks at under each value, ``S x n x ...``."""
    run, likelihood = FanOut(model, values, None), model.likelihood
    drawn = [run(batch) for batch in batches]
    if isinstance(likelihood, Contrasts):
        drawn = [torch.stack([likelihood.contrasts(y) for y in each]) for each in drawn]
    return torch.cat(drawn, 1).double()
