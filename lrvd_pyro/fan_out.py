"""One batch under several draws, without repeating what the draws share.

What precedes the first LoRA layer with a rank comes from the first draw's pass. The
passes of the others may hold several draws: copies of the batch, one below the other,
with a gate row per example.
"""

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lrvd_pyro.models.base import RankModel
from lrvd_pyro.noise import batch_size
from lrvd_pyro.prefix import Prefix

Batch = dict[str, Any]
CPU_ROWS, ROWS = 16, 256  # rows of a pass with several draws, unless told otherwise
TRIAL_EXAMPLES = 3

# By model: its LoRA modules when it was tried, and why it cannot share passes
_tried: weakref.WeakKeyDictionary[RankModel, tuple[tuple[str, ...], str]]
_tried = weakref.WeakKeyDictionary()


class FanOut:
    """The network's predictions for a batch under each of S draws, ``S x B x ...``.

    Equal to one pass per draw up to float error, at ``p + S (1 - p)`` passes, p the
    share of what precedes the first LoRA layer with a rank. Draws of weights
    (`FactorLoRA`) and DoRA layers share the prefix, but take one pass per draw.

    A model's first batch (again after pruning) goes through a trial, 18 rows in all:
    three examples, three draws, against one plain pass per draw. If the results differ
    by more than the precision explains, or the network refuses, or it is compiled,
    every draw takes a plain pass of the whole network and a warning says why.

    Wrong if the network, in eval mode, is no function of its inputs and the trial does
    not show it.

    Args:
        model: The model.
        values: What it binds, S x R; S x K for weights.
        max_batch: The most rows of a pass that holds several draws; a batch is never
            cut. None takes 16 on a CPU, whose caches larger passes outgrow, 256
            elsewhere.
    """

    def __init__(
        self, model: RankModel, values: Tensor, max_batch: int | None = None
    ) -> None:
        self.model, self.values = model, values
        on_cpu = model.space.device.type == "cpu"
        self.rows = max_batch or (CPU_ROWS if on_cpu else ROWS)

    def __call__(self, batch: Batch) -> Tensor:
        """The predictions for one batch, ``S x B x ...``."""
        if len(self.values) == 1 or self._obstacle(batch):
            return looped(self.model, self.values, batch)
        copies = self.rows // batch_size(batch) if takes_rows(self.model) else 1
        return fanned_out(self.model, self.values, batch, max(1, copies))

    def _obstacle(self, batch: Batch) -> str:
        """Why this model takes the loop; empty if it does not."""
        modules, found = _tried.get(self.model, ((), ""))
        if modules != self.model.space.modules:
            found = trial(self.model, self.values[[0, 1, -1]], batch)
            _tried[self.model] = self.model.space.modules, found
            if found:
                net = type(self.model.base_net.get_base_model()).__name__
                warnings.warn(
                    f"{net} cannot share passes between draws ({found}); predict runs "
                    f"the whole network once per draw instead",
                    stacklevel=4,
                )
        return found


def takes_rows(model: RankModel) -> bool:
    """Whether the model binds a draw per row: gates, and no DoRA layer."""
    return not model.space.sides and not model.space.dora


def trial(model: RankModel, values: Tensor, batch: Batch) -> str:
    """Why a model cannot share passes between three draws; empty if it can."""
    if any(m._compiled_call_impl is not None for m in model.base_net.modules()):
        return "it is compiled"
    few = _with_rows(batch, lambda rows: rows[:TRIAL_EXAMPLES])
    expected = looped(model, values, few)
    try:
        got = fanned_out(model, values, few, 2 if takes_rows(model) else 1)
        error = float((got - expected).abs().max())
    except Exception as failure:  # whatever it is, the loop did without
        return f"{type(failure).__name__}: {failure}"
    near = error <= resolution(model) ** 0.5 * (1 + float(expected.abs().max()))
    return "" if near else f"its predictions would differ by {error:.2g}"


def looped(model: RankModel, values: Sequence[Tensor] | Tensor, batch: Batch) -> Tensor:
    """The predictions under each draw, by one pass of the whole network per draw."""
    return torch.stack([_bound(model, value, batch) for value in values])


def fanned_out(model: RankModel, values: Tensor, batch: Batch, copies: int) -> Tensor:
    """The predictions under each draw: the first alone, then ``copies`` at a time."""
    prefix = Prefix(model.space)
    with prefix.recording():
        outputs = [_bound(model, values[0], batch)[None]]
    for chunk in values[1:].split(copies):
        with prefix.replaying():
            outputs.append(_stacked(model, chunk, batch))
    return torch.cat(outputs)


def _bound(model: RankModel, value: Tensor, batch: Batch) -> Tensor:
    with model.bind(value):
        return model.predictions(**batch)


def _stacked(model: RankModel, values: Tensor, batch: Batch) -> Tensor:
    """One pass for several draws, ``c x B x ...``."""
    if len(values) == 1:
        return _bound(model, values[0], batch)[None]
    copies, size = len(values), batch_size(batch)
    rows = _with_rows(batch, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)))
    output = _bound(model, values.repeat_interleave(size, 0), rows)
    return output.view(copies, size, *output.shape[1:])


def _with_rows(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with ``change`` made to every tensor that has a row per example."""
    size = batch_size(batch)

    def each(leaf: Any) -> Any:
        by_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
        return change(leaf) if by_row else leaf

    changed: Batch = tree_map(each, batch)
    return changed


def resolution(model: RankModel) -> float:
    """The coarsest relative precision at work in the network."""
    device = model.space.device.type
    parameters = model.base_net.parameters()
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    exact = torch.get_float32_matmul_precision() == "highest"
    return max(0.0 if exact else 2**-10, *(torch.finfo(d).eps for d in dtypes))
