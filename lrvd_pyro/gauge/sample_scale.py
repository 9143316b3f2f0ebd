"""The largest noise that draws bear, where the network is not linear in its adapter."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import kl_divergence

from lrvd_pyro.batches import Batch, batch_size, without_labels
from lrvd_pyro.inference.threads import alone_in_pyro
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.predictive.draws import seeded
from lrvd_pyro.predictive.fan_out import FanOut

__all__ = ["sample_scale"]

_EXAMPLES, _PAIRS, _HALVINGS, _STEPS = 256, 4, 10, 8


@torch.no_grad()
def sample_scale(
    model: RankModel,
    mean: Tensor,
    variance: Tensor,
    batches: Iterable[Batch],
    gamma: float,
    most: float,
) -> float:
    """The factor s on the variances that is best for draws, at most ``most``.

    ``s = argmin D(s) - gamma / 2 log s``. D(s) is the expected divergence of the
    predictions under the noise from those at the mean, ``(N/n) sum_i E KL(p(y | x_i,
    mean) || p(y | x_i, draw))``, in nats per data set. It is the ELBO of a log-uniform
    prior of multiplicity ``gamma / R`` in the one number s. While D is quadratic in the
    noise, ``D = s sum_i alpha_i F_i / 2`` and s is the scale by evidence. Where higher
    orders enter, D grows faster, and s is smaller.

    Args:
        model: The model.
        mean: What it binds at the posterior mean, (R,) or (K,).
        variance: The variances of the noise to scale.
        batches: Training batches; the first 256 examples are used.
        gamma: MacKay's effective number of parameters.
        most: The scale by evidence.

    Source: derived here.
    """
    some, count = [], 0
    for batch in batches:
        some.append(without_labels(batch))
        count += batch_size(batch)
        if count >= _EXAMPLES:
            break
    with evaluating(model), seeded(0):
        # Pairs of opposite draws leave out what is odd in the noise. The same draws at
        # all scales make the objective smooth.
        noise = torch.randn(_PAIRS, len(mean)).to(mean) * variance.sqrt()
        noise = torch.cat([noise, -noise])
        centers = [FanOut(model, mean[None], None)(batch)[0] for batch in some]

        def objective(log_scale: float) -> float:
            values = mean + math.exp(0.5 * log_scale) * noise
            drawn = FanOut(model, values, None)
            pairs = zip(some, centers)
            cost = sum(_divergence(model, c, drawn(batch)) for batch, c in pairs)
            return cost * model.num_data / count - gamma / 2 * log_scale

        high = math.log(most)
        return math.exp(_least(objective, high - _HALVINGS * math.log(2), high))


@alone_in_pyro()
def _divergence(model: RankModel, center: Tensor, drawn: Tensor) -> float:
    """The divergence summed over a batch, and averaged over draws."""
    laws = [_law(model, each) for each in (center, *drawn)]
    return float(
        sum(kl_divergence(laws[0], law).sum() for law in laws[1:]) / len(drawn)
    )


def _law(model: RankModel, predictions: Tensor) -> Any:
    program = poutine.trace(model.likelihood)
    run = program.get_trace(predictions, None, model.num_data)
    law: Any = run.nodes["labels"]["fn"]
    return law


def _least(objective: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one minimum is least: golden section, after Kiefer."""
    ratio = (math.sqrt(5) - 1) / 2
    inner = [high - ratio * (high - low), low + ratio * (high - low)]
    costs = [objective(x) for x in inner]
    for _ in range(_STEPS):
        if costs[0] < costs[1]:
            high, inner[1], costs[1] = inner[1], inner[0], costs[0]
            inner[0] = high - ratio * (high - low)
            costs[0] = objective(inner[0])
        else:
            low, inner[0], costs[0] = inner[0], inner[1], costs[1]
            inner[1] = low + ratio * (high - low)
            costs[1] = objective(inner[1])
    return inner[0] if costs[0] < costs[1] else inner[1]
