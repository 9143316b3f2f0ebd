"""Predictions under the posterior: streamed, under one draw, or at the mean.

Several threads may predict with one model: they take turns, and a draw belongs to the
thread that binds it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from lrvd_pyro._numbers import check_count
from lrvd_pyro.batches import (
    Batch,
    batch_size,
    check_alike,
    opened,
    without_labels,
)
from lrvd_pyro.inference.pairs import paired
from lrvd_pyro.inference.programs import Guide
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.predictive.draws import (
    bound_values,
    draw_latents,
    guide_draws,
    posterior_draws,
    ready,
    seeded,
)
from lrvd_pyro.predictive.fan_out import FanOut
from lrvd_pyro.predictive.linearized import (
    GateGaussian,
    Linearized,
    check_linearizable,
    gate_gaussian,
)

__all__ = ["mean_value", "posterior_mean", "posterior_sample", "predict"]


def predict(
    model: RankModel,
    guide: Guide | None,
    batches: Iterable[Batch],
    num_samples: int = 16,
    *,
    method: Literal["sample", "linearized"] = "sample",
    posterior_samples: Mapping[str, Tensor] | None = None,
    return_samples: bool = False,
    max_batch: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Any:
    """The posterior predictive, by draws of the adapter or linearized in it.

    "sample": ``p(y | x) = 1/S sum_s p(y | x, z_s)``, with the same S draws for every
    batch. The network before the first LoRA layer with a rank, a share p of it, runs
    once per batch. That makes ``p + S (1 - p)`` forward passes (see `FanOut`).

    "linearized": ``p(y | x) = E p(y | c)`` with ``c ~ Normal(c(m), J V J^T)``. The
    contrasts c are logit differences or a mean. J is their Jacobian at the posterior
    mean m of gates or weights, and V their posterior covariance, times the guide's
    ``linearized_scale`` if it has one. The expectation takes
    1,024 points, which cost nothing; ``num_samples`` and ``max_batch`` play no part.
    The cost is one forward pass, and one backward pass per contrast: C - 1 for C
    classes, one for regression.

    The network runs in eval mode. Its mode and the random state are restored.

    Example::

        prediction = predict(model, guide, [tokenizer(texts, return_tensors="pt")])
        prediction.probs, prediction.mutual_information

    Args:
        model: The trained model.
        guide: Its guide. May be None if ``posterior_samples`` are given.
        batches: Dicts of tensors as the model takes them; labels are ignored.
        num_samples: The number of draws S.
        method: "sample" or "linearized".
        posterior_samples: Draws to use instead of the guide's, by site, ``S x size``
            each: from `pyro.infer.Predictive` or MCMC. Their number replaces
            ``num_samples``.
        return_samples: Keep each draw's prediction, ``S x n x ...``.
        max_batch: The most rows of a forward pass that holds several draws. A batch is
            never cut. None takes 16 on a CPU, 256 elsewhere.
        seed: Seed of the draws.
        progress: Show a bar over the batches.

    Returns:
        What the likelihood collects: a `CategoricalPrediction` or a
        `NormalPrediction`, for instance.

    Raises:
        TypeError: If ``batches`` is one batch, or a batch is not a mapping or holds no
            tensor. Linearized also for a model of neither gates nor weights, for DoRA
            layers, and for a likelihood without contrasts.
        ValueError: If there is no batch, or a datum's prediction has another shape in
            another batch, as of token labels at another length. If the guide has no
            parameters yet, or was built on another model. If ``num_samples`` or
            ``max_batch`` is below 1, or ``method`` is neither of the two. If the draws
            lack a latent site or differ in number. Linearized also if there is only one
            draw, draws are given beside a guide whose ``linearized_scale`` is not 1,
            or examples see each other.

    Wrong when the posterior is wide, if linearized: it ignores curvature, and any shift
    that the noise causes in the mean (see examples/results/README.md).

    Source: for the linearized predictive, MacKay (1992); Immer, Korzepa and Bauer
    (2021, arXiv 2008.08216); Daxberger et al. (2021, arXiv 2106.14806).
    """
    guide = paired(model, guide)
    if method not in ("sample", "linearized"):
        raise ValueError(f'method={method!r}; expected "sample" or "linearized"')
    if method == "linearized":
        check_linearizable(model)
    if max_batch is not None:
        check_count("max_batch", max_batch, 1, "max_batch=16, or None")
    call = "predict(model, guide, [batch], num_samples=16)"
    inputs = map(_inputs, opened(batches, num_samples, call))
    first = next(inputs)
    fields: dict[str, list[Tensor]] = {}
    with evaluating(model), torch.no_grad(), seeded(seed):
        outputs: Callable[[dict[str, Any]], Tensor]
        if method == "linearized":
            gaussian = _gaussian(model, guide, first, posterior_samples)
            outputs = Linearized(model, gaussian)
        else:
            draws = posterior_draws(model, guide, first, num_samples, posterior_samples)
            outputs = FanOut(model, bound_values(model, draws), max_batch)
    # The caller's batches come while no turn is held: they may wait for other threads.
    for batch in tqdm(chain([first], inputs), disable=not progress, desc="predict"):
        with evaluating(model), torch.no_grad(), seeded(seed):
            summary = model.likelihood.summarize(outputs(batch))
        for name, field in summary.items():
            # S x n x ... outgrows memory where the other fields do not.
            if name != "samples" or return_samples:
                parts = fields.setdefault(name, [])
                check_alike(name, (parts or [field])[0], field)
                parts.append(field)
    return model.likelihood.collect({k: torch.cat(v) for k, v in fields.items()})


@contextmanager
def posterior_sample(
    model: RankModel, guide: Guide, *, seed: int
) -> Iterator[PeftModel]:
    """Run the network under one draw from the posterior within the block.

    All of Transformers works there, ``generate`` too. Other threads that predict wait
    until the block ends. A thread that is started within it has no draw, and its passes
    are refused. The block must end before an ``await``::

        with posterior_sample(model, guide, seed=0) as net:
            net.generate(**prompt)

    Args:
        model: The trained model.
        guide: Its guide, which must not look at the batch.
        seed: Seed of the draw; the random state is restored.

    Raises:
        ValueError: If the guide has no parameters yet, was built on another model, or
            lacks a latent site.
    """
    with torch.no_grad(), seeded(seed):
        latents = draw_latents(model, guide, {})
        value = model.value_at(latents)
    with model.bind(value):
        yield model.base_net


@contextmanager
def posterior_mean(
    model: RankModel, guide: Guide, *, num_samples: int = 1000
) -> Iterator[PeftModel]:
    """Run the network at the posterior mean of its adapter within the block.

    The mean is exact for guides with a method ``mean`` (`RankDiagonal`). For others it
    is the mean of ``num_samples`` draws, which cost no forward pass. Threads are as in
    `posterior_sample`.

    Example::

        with posterior_mean(model, guide) as net:
            logits = net(**batch).logits

    Args:
        model: The trained model.
        guide: Its guide, which must not look at the batch.
        num_samples: The number of draws for guides without ``mean``.

    Raises:
        ValueError: If the guide has no parameters yet, was built on another model, or
            lacks a latent site.

    Wrong as the mean of the predictions: the network is not linear in its adapter.
    `predict` averages predictions.
    """
    value = mean_value(model, guide, num_samples)
    with model.bind(value):
        yield model.base_net


def mean_value(model: RankModel, guide: Guide, num_samples: int = 1000) -> Tensor:
    """What the model binds at the posterior mean, `R` or `K`; see `posterior_mean`."""
    with torch.no_grad(), seeded(0):
        guide = ready(model, guide)
        if hasattr(guide, "mean"):
            mean: Tensor = guide.mean()
            return mean
        check_count("num_samples", num_samples, 1, "posterior_mean(model, guide)")
        # The mean of what is bound, not what is bound at the mean: a gate may be a
        # product of latent sites.
        draws = guide_draws(model, guide, {}, num_samples)
        return torch.stack([model.value_at(z) for z in draws]).mean(0)


def _inputs(batch: Batch) -> dict[str, Any]:
    inputs = without_labels(batch)
    batch_size(inputs)  # refuses a batch without tensors before the network runs
    return inputs


def _gaussian(
    model: RankModel,
    guide: Guide | None,
    batch: Batch,
    posterior_samples: Mapping[str, Tensor] | None,
) -> GateGaussian:
    """Mean and covariance of what is drawn: of the caller's draws, or the guide's."""
    scale = getattr(guide, "linearized_scale", 1.0)
    if posterior_samples is not None and scale != 1:
        raise ValueError(
            f"posterior_samples have the noise of draws, and the guide has "
            f"linearized_scale={scale:.3g} besides; leave posterior_samples out, or "
            f"take them as they are: predict(model, None, ..., posterior_samples=...)"
        )
    draws = posterior_draws(model, guide, batch, 1, posterior_samples)
    if posterior_samples is not None:
        return GateGaussian.of_draws(bound_values(model, draws))
    assert guide is not None  # else there were no draws
    return gate_gaussian(model, guide, batch)
