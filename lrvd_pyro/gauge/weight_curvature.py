"""The curvature of the likelihood about every element of A and B."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from lrvd_pyro.batches import (
    Batch,
    batch_size,
    check_several,
    gate_rows,
    without_labels,
)
from lrvd_pyro.gauge.marginal_likelihood import Evidence
from lrvd_pyro.gauge.second_moments import seeded_by
from lrvd_pyro.likelihoods.base import curvature_of
from lrvd_pyro.models.base import RankModel, evaluating
from lrvd_pyro.models.singles import separable
from lrvd_pyro.predictive.predictive import mean_value
from lrvd_pyro.rank_space.rows import Side
from lrvd_pyro.rank_space.space import RankSpace
from lrvd_pyro.rank_space.weight_taps import WeightTaps

__all__ = ["evidence"]

_SIDES: tuple[Side, ...] = ("lora_A", "lora_B")
_EXACT = 16  # roots of the Fisher matrix; beyond, one random sum of them
_SKETCH = 2048  # numbers that stand for the gradient of a root


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

    ``H = (N/n) sum_i sum_k J_ik J_ik^T``, with ``J_ik = d root_k(x_i) / d theta``: the
    generalized Gauss-Newton matrix at the posterior mean, over the n examples of
    ``batches``. The K roots are those of `Curvature.fisher_roots`: C - 1 for C classes,
    one for regression. Kept are its diagonal, and a sketch of each J_ik.

    Each batch costs a forward pass and K backward passes. The memory beyond these is
    that of one module's weights for each example of a batch, and 8 kB on the CPU for
    each example and root.

    Example::

        found = evidence(model, guide, loader)
        found.precision, found.gamma, found.gamma_loo

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
        RuntimeError: If a layer runs under activation checkpointing in eval mode too.

    Source: the generalized Gauss-Newton matrix, Schraudolph (2002); random signs,
    Hutchinson (1990); the sketch, see `Evidence`.
    """
    check_several(batches, "evidence(model, guide, [batch])")
    likelihood = curvature_of(model.likelihood, "noise by evidence")
    space, mean = model.space, mean_value(model, guide)  # type: ignore[arg-type]
    taps, gated = WeightTaps(space, _SIDES), model.binds == "gates"
    fisher, count = space.ones() * 0, 0
    weights = _Weights(space)
    sketches, slopes = [], []
    with evaluating(model), seeded_by(generator), torch.enable_grad():
        shown = tqdm(batches, disable=not progress, desc="evidence")
        for batch in separable(model, shown):
            examples = batch_size(batch)
            value = gate_rows(mean, batch) if gated else mean
            with taps.open(), model.bind(value):
                predictions = model.predictions(**without_labels(batch))
            roots = likelihood.fisher_roots(predictions)
            found = []
            for root in _scores(roots, sampled):
                others = [value] if gated else []
                about, rows = taps.gradients(root, examples, others)
                fisher += sum(g.square().sum(0) for g in about)
                found.append(weights.add(rows, examples))
            sketch, slope = zip(*found, strict=True)
            sketches.append(torch.stack(sketch, 1))
            slopes.append(torch.stack(slope, 1))
            count += examples
    if not count:
        raise ValueError("got no batches; expected the training set")
    whole = model.num_data / count
    return Evidence(
        torch.cat(weights.squares) * whole,
        fisher * whole if gated else None,
        torch.cat(sketches),
        torch.cat(slopes),
        whole,
    )


class _Weights:
    """Sums over gradients about A and B, module by module.

    Attributes:
        squares: The sums of squares, one tensor per module and side.
    """

    def __init__(self, space: RankSpace) -> None:
        weights = [
            rows.flatten(weight.detach())
            for side in _SIDES
            for rows, weight in zip(space.rows(side), space.weights(side), strict=True)
        ]
        self._theta = [weight.flatten() for weight in weights]
        self.squares = [torch.zeros_like(weight) for weight in self._theta]
        # The same signs for all batches; they have nothing to do with the user's.
        source = torch.Generator().manual_seed(0)
        self._signs = [
            torch.randint(0, 2, w.shape, generator=source).mul_(2).sub_(1).to(w)
            for w in self._theta
        ]

    def add(self, rows: Iterator[Tensor], examples: int) -> tuple[Tensor, Tensor]:
        """One gradient per example: its sketch, ``B x q``, and its part along theta.

        The sketch adds up elements that are q apart, with random signs: the inner
        products of gradients stay as they are, on average over the signs.
        """
        sketch = self._theta[0].new_zeros(examples, _SKETCH)
        slope, begin = sketch.new_zeros(examples), 0
        for number, gradient in enumerate(rows):
            each = gradient.flatten(1)
            self.squares[number] += each.square().sum(0)
            slope += each @ self._theta[number]
            front = begin % _SKETCH
            begin += each.shape[1]
            padded = F.pad(each * self._signs[number], (front, -begin % _SKETCH))
            sketch += padded.unflatten(1, (-1, _SKETCH)).sum(1)
        return sketch.cpu(), slope.cpu()


def _scores(roots: Tensor, sampled: bool | None) -> Iterable[Tensor]:
    """Sums over the batch whose squared gradients add up to the curvature."""
    if sampled is None:
        sampled = roots.shape[1] > _EXACT
    if not sampled:
        return roots.sum(0)
    signs = torch.randint_like(roots, 2, device=roots.device) * 2 - 1
    return [(roots * signs).sum()]
