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

from lrvd_pyro._compat.torch import is_compiled, tree_leaves, tree_map
from lrvd_pyro.batches import batch_size
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.predictive.prefix import Prefix

Batch = dict[str, Any]
CPU_ROWS, ROWS = 16, 256  # rows of a pass with several draws, unless told otherwise
TRIAL_EXAMPLES = 3

# By model: for each setting that was tried, why it cannot share passes
_tried: weakref.WeakKeyDictionary[RankModel, dict[tuple[Any, ...], str]]
_tried = weakref.WeakKeyDictionary()


class FanOut:
    """The network's predictions for a batch under each of S draws, ``S x B x ...``.

    Equal to one pass per draw up to float error, at ``p + S (1 - p)`` passes, p the
    share of what precedes the first LoRA layer with a rank. Draws of weights
    (`FactorLoRA`) and DoRA layers share the prefix, but take one pass per draw.

    A model's first batch goes through a trial: three examples under three gates, far
    apart, against one plain pass per gate, and the same under three equal gates, which
    shows what rounding does. If the results differ by more, or the network refuses, or
    it is compiled, every draw takes a plain pass of the whole network and a warning
    says why. It is tried anew after pruning, at another precision, and where other
    tensors of a batch are as long as the batch; and again for the next batch as long as
    the adapter changes nothing, as at its start.

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
        copies = self.rows // batch_size(batch) if takes_rows(self.model) else 1
        copies = max(1, min(copies, len(self.values) - 1))
        if len(self.values) == 1 or self._obstacle(batch, min(copies, 2)):
            return looped(self.model, self.values, batch)
        return fanned_out(self.model, self.values, batch, copies)

    def _obstacle(self, batch: Batch, copies: int) -> str:
        """Why this model takes the loop; empty if it does not."""
        by_row = tuple(_by_row(leaf, batch_size(batch)) for leaf in tree_leaves(batch))
        setting = (self.model.space.modules, resolution(self.model), by_row, copies)
        known = _tried.setdefault(self.model, {})
        if setting in known:
            return known[setting]
        found = trial(self.model, self.values[[0, 1, -1]], batch, copies)
        if found is None:
            return ""
        if found and found not in known.values():
            net = type(self.model.base_net.get_base_model()).__name__
            warnings.warn(
                f"{net} cannot share passes between draws ({found}); predict runs the "
                f"whole network once per draw instead",
                stacklevel=4,
            )
        known[setting] = found
        return found


def takes_rows(model: RankModel) -> bool:
    """Whether the model binds a draw per row: gates, and no DoRA layer."""
    return model.binds == "gates" and not model.space.dora


def trial(model: RankModel, values: Tensor, batch: Batch, copies: int) -> str | None:
    """Why a model cannot share passes; empty if it can, None if nothing shows it."""
    if is_compiled(model.base_net):
        return "it is compiled"
    if model.binds == "gates":  # all on, and two that turn off half each
        half = torch.arange(values.shape[1], device=values.device) % 2
        values = torch.stack([torch.ones_like(half), half, 1 - half]).to(values)
    few = _with_rows(batch, lambda rows: rows[:TRIAL_EXAMPLES])
    try:
        expected, equal = looped(model, values, few), values[[1, 1, 1]]
        error = _largest(fanned_out(model, values, few, copies) - expected)
        rounding = _largest(fanned_out(model, equal, few, copies) - expected[1])
    except torch.OutOfMemoryError:
        raise
    except Exception as failure:  # whatever it is, one plain pass a draw may do
        return f"{type(failure).__name__}: {failure}"
    size, ulp = _largest(expected), resolution(model)
    limit = min(max(8 * rounding, 2 * ulp * (1 + size)), ulp**0.5 * (1 + size))
    if error > limit:
        return f"its predictions would differ by {error:.2g}"
    return "" if _largest(expected - expected[0]) > 8 * limit else None


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

    changed: Batch = tree_map(
        lambda leaf: change(leaf) if _by_row(leaf, size) else leaf, batch
    )
    return changed


def _by_row(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def resolution(model: RankModel) -> float:
    """The coarsest relative precision at work in the network."""
    device = model.space.device.type
    parameters = model.base_net.parameters()
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    exact = torch.get_float32_matmul_precision() == "highest"
    return max(0.0 if exact else 2**-10, *(torch.finfo(d).eps for d in dtypes))
