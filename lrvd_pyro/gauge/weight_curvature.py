"""The curvature of the likelihood about every element of A and B."""

from collections.abc import Iterable, Iterator

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
_NUMBERS = 2**27  # of all sketches
_SIDE, _LEAST = 8192, 2048  # of the smaller side of the sketch; of each sketch


def evidence(
    model: RankModel,
    guide: object,
    batches: Iterable[Batch],
    *,
    sampled: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Evidence:
    """Gather the curvature of the likelihood about every element of A and B.

    ``H = (N/n) sum_i sum_k J_ik J_ik^T``, with ``J_ik = d root_k(x_i) / d theta``: the
    generalized Gauss-Newton matrix at the posterior mean, over the n examples of
    ``batches``. The K roots are those of `Curvature.fisher_roots`: C - 1 for C classes,
    one for regression. Kept are its diagonal, and a sketch of each J_ik.

    Each batch costs a forward pass and K backward passes. The memory beyond these is
    that of one module's weights for each example of a batch, and of the sketch on the
    CPU. A sketch has P numbers, which is exact, or what 2^27 (0.5 GB, four times as
    much for a moment) allow for N K gradients, at least 2,048. For N K > 8,192 it has
    8,192 at most, since eigenvalues cost the cube of the smaller of the two.

    Example::

        found = evidence(model, guide, loader)
        found.precision, found.gamma, found.gamma_loo

    Args:
        model: A trained model, in eval mode for the time.
        guide: Its guide, for the posterior mean.
        batches: Batches of the training set, with or without labels. Where they are a
            part of it, they stand for all of it.
        sampled: Take one sum of the K roots by random signs, for one backward pass. It
            gives h and the gates' Fisher information without bias, and nothing else:
            precision, gamma and gamma_loo are then refused.
        generator: The random state of the signs; None uses torch's global one.
        progress: Show a bar over the batches.

    Raises:
        TypeError: If the likelihood lacks ``fisher_roots``, or ``batches`` is one
            batch.
        ValueError: If no batch is given, there are more examples than ``num_data``, or
            the network takes no draw per example.
        RuntimeError: If a layer runs under activation checkpointing in eval mode too.

    Source: the generalized Gauss-Newton matrix, Schraudolph (2002); random signs,
    Hutchinson (1990); the sketch, see `Evidence`.
    """
    call = "evidence(model, guide, [batch])"
    check_several(batches, call)
    likelihood = curvature_of(model.likelihood, "noise by evidence")
    space, mean = model.space, mean_value(model, guide)  # type: ignore[arg-type]
    taps, gated = WeightTaps(space, _SIDES), model.binds == "gates"
    fisher, count = torch.zeros(space.size, dtype=torch.double), 0
    weights = _Weights(space)
    sketches, slopes = [], []
    with evaluating(model), seeded_by(generator), torch.enable_grad():
        shown = tqdm(batches, disable=not progress, desc="evidence")
        for batch in separable(model, shown):
            examples = batch_size(batch)
            count += examples
            _check_count(count, model)
            value = gate_rows(mean, batch) if gated else mean
            with taps.open(), model.bind(value):
                predictions = model.predictions(**without_labels(batch))
            roots = likelihood.fisher_roots(predictions)
            if not (sampled or weights.size):
                weights.size = _sketch_size(weights.count, model.num_data, roots)
            found = []
            for root in _signed(roots) if sampled else roots.sum(0):
                others = [value] if gated else []
                about, rows = taps.gradients(root, examples, others)
                for gradient in about:
                    fisher += gradient.cpu().double().square().sum(0)
                found.append(weights.add(rows, examples))
            sketch, slope = zip(*found, strict=True)
            sketches.append(torch.stack(sketch, 1))
            slopes.append(torch.stack(slope, 1))
    if not count:
        raise ValueError(f"got no batches; expected the training set: {call}")
    whole = model.num_data / count
    squares = torch.cat(weights.squares) * whole
    return Evidence(
        squares,
        (fisher * whole).to(squares) if gated else None,
        None if sampled else torch.cat(sketches),
        torch.cat(slopes),
        whole,
    )


class _Weights:
    """Sums over gradients about A and B, module by module.

    Attributes:
        count: The number of weights P.
        squares: The sums of squares, one tensor per module and side.
        size: The numbers q of a sketch; 0 for none.
    """

    def __init__(self, space: RankSpace) -> None:
        weights = [
            rows.flatten(weight.detach())
            for side in _SIDES
            for rows, weight in zip(space.rows(side), space.weights(side), strict=True)
        ]
        # Sums of half-precision numbers would stop to grow.
        self._theta = [_precise(weight.flatten()) for weight in weights]
        self.squares = [torch.zeros_like(weight) for weight in self._theta]
        self.count, self.size = sum(map(len, self._theta)), 0
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
        sketch = self._theta[0].new_zeros(examples, self.size)
        slope, begin = sketch.new_zeros(examples), 0
        for number, gradient in enumerate(rows):
            each = _precise(gradient.flatten(1))
            self.squares[number] += each.square().sum(0)
            slope += each @ self._theta[number]
            if self.size:
                _add_around(sketch, each * self._signs[number], begin)
            begin += each.shape[1]
        return sketch.cpu(), slope.cpu()


def _add_around(sketch: Tensor, rows: Tensor, begin: int) -> None:
    """Add ``rows`` from column ``begin`` on, and again from 0 where they are longer."""
    size = sketch.shape[1]
    while rows.shape[1]:
        at = begin % size
        part, rows = rows[:, : size - at], rows[:, size - at :]
        sketch[:, at : at + part.shape[1]] += part
        begin += part.shape[1]


def _sketch_size(count: int, num_data: int, roots: Tensor) -> int:
    """The numbers q that stand for each of the gradients of all the data."""
    gradients = num_data * roots.shape[1]
    fits = max(_LEAST, _NUMBERS // gradients)
    return min(count, fits if gradients <= _SIDE else min(fits, _SIDE))


def _check_count(count: int, model: RankModel) -> None:
    """Refuse more examples than there are: they would count less than once each."""
    if count > model.num_data:
        raise ValueError(
            f"got {count} examples or more, and num_data={model.num_data}; expected "
            f"the training set, each example once: "
            f"{type(model).__name__}(..., num_data=len(train))"
        )


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _signed(roots: Tensor) -> list[Tensor]:
    """One sum of the roots by random signs, whose squared gradient is unbiased."""
    signs = torch.randint_like(roots, 2, device=roots.device) * 2 - 1
    return [(roots * signs).sum()]
