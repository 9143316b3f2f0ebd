"""How much noise the data allow A and B: MacKay's evidence, by its diagonal."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lrvd_pyro.batches import (
    Batch,
    batch_size,
    check_several,
    gate_rows,
    without_labels,
)
from lrvd_pyro.gauge.second_moments import seeded_by
from lrvd_pyro.likelihoods.base import curvature_of
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.models.singles import separable
from lrvd_pyro.predictive.predictive import mean_value
from lrvd_pyro.rank_space.rows import Side
from lrvd_pyro.rank_space.weight_taps import WeightTaps

__all__ = ["Evidence", "evidence"]

_SIDES: tuple[Side, ...] = ("lora_A", "lora_B")
_EXACT = 16  # roots of the Fisher matrix; beyond, one random sum of them


@dataclass(frozen=True)
class Evidence:
    """The curvature of the likelihood about A and B, and the noise that it allows.

    Let h_j be the curvature about element j. Under a prior ``N(0, 1/delta)`` Laplace's
    log evidence is ``-delta |theta|^2 / 2 - 1/2 sum_j log(1 + h_j / delta)``, up to a
    constant. It is greatest where ``delta |theta|^2 = gamma``, and ``gamma = sum_j h_j
    / (h_j + delta)`` counts the parameters that the data determine.

    Attributes:
        curvature: h of each element, (P,), as ``RankSpace.flatten("lora_A", "lora_B")``
            lays the elements out; in nats per data set.
        weights: The elements themselves, (P,).
        gate_fisher: The Fisher information of each gate at its mean, (R,), in nats per
            data set; None for a model without gates.

    Raises:
        ValueError: From ``precision`` and what depends on it, if the evidence has no
            maximum: all weights, or all curvatures, are 0.

    Wrong as the number of parameters where elements are far from independent: by its
    diagonal, gamma can exceed the number of examples, which no exact count does.

    Source: MacKay (1992), "The evidence framework applied to classification networks".
    """

    curvature: Tensor
    weights: Tensor
    gate_fisher: Tensor | None

    @cached_property
    def precision(self) -> float:
        """delta, the precision of the prior at which the evidence is greatest."""
        h = self.curvature.double()
        size = self.weights.double().square().sum()
        if not (size > 0 and h.isfinite().all() and h.sum() > 0):
            raise ValueError(
                f"the evidence has no maximum: |A, B|^2 is {float(size):.3g} and the "
                f"curvature sums to {float(h.sum()):.3g}; train the adapter first, and "
                f"pass the batches that it was trained on"
            )
        # gamma falls in delta and delta |theta|^2 rises, so that they meet once: not
        # above sqrt(sum h / |theta|^2), since gamma < sum h / delta.
        high = 0.5 * (h.sum() / size).log()
        low = high - 1.0
        while low.exp() * size > (h / (h + low.exp())).sum():
            low = low - (high - low)
        for _ in range(60):
            middle = (low + high) / 2
            above = middle.exp() * size > (h / (h + middle.exp())).sum()
            low, high = (low, middle) if above else (middle, high)
        return float(((low + high) / 2).exp())

    @cached_property
    def gamma(self) -> float:
        """MacKay's effective number of parameters."""
        h = self.curvature.double()
        return float((h / (h + self.precision)).sum())


def evidence(
    model: RankModel,
    guide: object,
    batches: Iterable[Batch],
    *,
    sampled: bool | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Evidence:
    """Gather the curvature of the likelihood about every element of A and B.

    ``h_j = (N/n) sum_i sum_k (d root_k(x_i) / d theta_j)^2``: the diagonal of the
    generalized Gauss-Newton matrix at the posterior mean, over the n examples of
    ``batches``. The K roots are those of `Curvature.fisher_roots`: C - 1 for C classes,
    one for regression. Each batch costs a forward pass and K backward passes. The
    memory beyond these is that of one module's weights for each example of a batch.

    Example::

        found = evidence(model, guide, loader)
        found.gamma, found.precision

    Args:
        model: A trained model, in eval mode for the time.
        guide: Its guide, for the posterior mean.
        batches: Batches of the training set, with or without labels. Where they are a
            part of it, they stand for all of it.
        sampled: Take one sum of the roots by random signs, which needs one backward
            pass and gives h without bias. None does so beyond 16 roots.
        generator: The random state of the signs; None uses torch's global one.
        progress: Show a bar over the batches.

    Raises:
        TypeError: If the likelihood lacks ``fisher_roots``, or ``batches`` is one
            batch.
        ValueError: If no batch is given, or the network takes no draw per example.
        RuntimeError: From torch, if a layer runs under reentrant activation
            checkpointing in eval mode too.

    Source: the generalized Gauss-Newton matrix, Schraudolph (2002); random signs,
    Hutchinson (1990).
    """
    check_several(batches, "evidence(model, guide, [batch])")
    likelihood = curvature_of(model.likelihood, "noise by evidence")
    space, mean = model.space, mean_value(model, guide)  # type: ignore[arg-type]
    taps, gated = WeightTaps(space, _SIDES), model.binds == "gates"
    sizes = [w.numel() for side in _SIDES for w in space.weights(side)]
    sums = [space.ones(size) * 0 for size in sizes]
    fisher, count = space.ones() * 0, 0
    with evaluating(model), seeded_by(generator), torch.enable_grad():
        shown = tqdm(batches, disable=not progress, desc="evidence")
        for batch in separable(model, shown):
            examples = batch_size(batch)
            value = gate_rows(mean, batch) if gated else mean
            with taps.open(), model.bind(value):
                predictions = model.predictions(**without_labels(batch))
            roots = likelihood.fisher_roots(predictions)
            for root in _scores(roots, sampled):
                others = [value] if gated else []
                about, rows = taps.gradients(root, examples, others)
                fisher += sum(g.square().sum(0) for g in about)
                for total, gradient in zip(sums, rows):
                    total += gradient.square().sum(0).flatten()
            count += examples
    if not count:
        raise ValueError("got no batches; expected the training set")
    whole = model.num_data / count
    return Evidence(
        torch.cat(sums) * whole,
        space.flatten(*_SIDES).detach(),
        fisher * whole if gated else None,
    )


def _scores(roots: Tensor, sampled: bool | None) -> Iterable[Tensor]:
    """Sums over the batch whose squared gradients add up to the curvature."""
    if sampled is None:
        sampled = roots.shape[1] > _EXACT
    if not sampled:
        return roots.sum(0)
    signs = torch.randint_like(roots, 2, device=roots.device) * 2 - 1
    return [(roots * signs).sum()]
