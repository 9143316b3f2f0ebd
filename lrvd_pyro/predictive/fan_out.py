"""One batch under several draws, without repeating what the draws share.

The modules before the first LoRA layer with a rank run in the first draw's pass only.
Each later pass may hold several draws: copies of the batch, one below the other, with a
gate row per example.
"""

import math
import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro._compat.torch import is_compiled, tree_leaves
from lrvd_pyro.batches import batch_size
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.inputs import Uncopyable, by_row, with_rows
from lrvd_pyro.models.singles import resolution
from lrvd_pyro.predictive.prefix import Prefix
from lrvd_pyro.rank_space.find import plain_net

__all__ = ["FanOut", "fanned_out", "looped", "trial"]

_Inputs = dict[str, Any]  # tree_map looks into a dict, but takes other mappings whole
_CPU_ROWS, _ROWS = 16, 256  # rows of a pass with several draws, by default
_TRIAL_EXAMPLES = 3

# By model, and there by setting: why the model cannot share passes ("" if it can). The
# keys are weak, so that a trial does not keep a network in memory.
_tried: weakref.WeakKeyDictionary[RankModel, dict[tuple[Any, ...], str]]
_tried = weakref.WeakKeyDictionary()


class FanOut:
    """The network's predictions for a batch under each of S draws, ``S x B x ...``.

    The result equals that of one pass per draw, up to float error. It costs
    ``p + S (1 - p)`` passes, where p is the share of the network before the first LoRA
    layer with a rank. Draws of weights (`FactorLoRA`) and DoRA layers share the prefix,
    but take one pass per draw.

    A model's first batch goes through a trial. Three examples run under three gates far
    apart, and again under three equal gates. Both runs are compared with one plain pass
    per gate; the equal gates show what rounding does. The model does not share passes
    if the results differ by more than rounding, if the network raises an error, or if
    it is compiled. Every draw then takes a plain pass of the whole network, and a
    warning says why.

    The trial is repeated after pruning, at another precision, and where other tensors
    of a batch are as long as the batch. While the adapter changes nothing, as at its
    start, the trial is inconclusive and is repeated for the next batch.

    Wrong when the network, in eval mode, is not a function of its inputs and the trial
    does not show it.

    Args:
        model: The model.
        values: What the model binds, ``S x R``; ``S x K`` for weights.
        max_batch: The most rows of a pass that holds several draws. A batch is never
            cut. None takes 16 on a CPU, whose caches larger passes outgrow, and 256
            elsewhere.
    """

    def __init__(
        self, model: RankModel, values: Tensor, max_batch: int | None = None
    ) -> None:
        self.model, self.values = model, values
        on_cpu = model.space.device.type == "cpu"
        self.rows = max_batch or (_CPU_ROWS if on_cpu else _ROWS)

    def __call__(self, batch: _Inputs) -> Tensor:
        """The predictions for one batch, ``S x B x ...``."""
        copies = self.rows // batch_size(batch) if _takes_rows(self.model) else 1
        copies = max(1, min(copies, len(self.values) - 1))
        # The trial has two draws after the first, so it holds two copies at most.
        if len(self.values) == 1 or self._obstacle(batch, min(copies, 2)):
            return looped(self.model, self.values, batch)
        return fanned_out(self.model, self.values, batch, copies)

    def _obstacle(self, batch: _Inputs, copies: int) -> str:
        """Why this model needs one plain pass per draw; empty if it does not."""
        rows = tuple(by_row(leaf, batch_size(batch)) for leaf in tree_leaves(batch))
        setting = (self.model.space.modules, resolution(self.model), rows, copies)
        known = _tried.setdefault(self.model, {})
        if setting in known:
            return known[setting]
        reason = trial(self.model, self.values[[0, 1, -1]], batch, copies)
        if reason is None:
            return ""
        # A pass that ended has been judged. Its error would be the reason below.
        if reason and self.model.space.binding.passes:
            self.model.space.check_fired()
        if reason and reason not in known.values():
            net = type(plain_net(self.model.base_net)).__name__
            warnings.warn(
                f"{net} cannot share passes between draws ({reason}); predict runs the "
                f"whole network once per draw instead",
                stacklevel=4,
            )
        known[setting] = reason
        return reason


def trial(model: RankModel, values: Tensor, batch: _Inputs, copies: int) -> str | None:
    """Why a model cannot share passes; empty if it can, None if nothing shows it.

    Args:
        model: The model.
        values: Three draws, ``3 x R`` or ``3 x K``. Of gates only the shape is used.
        batch: The batch, of which the first three examples are used.
        copies: Draws per pass.
    """
    if is_compiled(model.base_net):
        return "it is compiled"
    if values.is_meta:
        return None  # the device has no numbers to compare
    if model.binds == "gates":
        # The posterior's own draws may lie too close together to tell rows apart. So
        # one gate has every component on, and two turn off one half each.
        half = torch.arange(values.shape[1], device=values.device) % 2
        values = torch.stack([torch.ones_like(half), half, 1 - half]).to(values)
    few = with_rows(batch, batch_size(batch), lambda rows: rows[:_TRIAL_EXAMPLES])
    try:
        expected, equal = looped(model, values, few), values[[1, 1, 1]]
        error = _error(fanned_out(model, values, few, copies), expected)
        rounding = _error(
            fanned_out(model, equal, few, copies), expected[[1]].expand_as(expected)
        )
    except (torch.OutOfMemoryError, Uncopyable):
        # The next batch may find enough memory: no verdict must be remembered. And what
        # cannot be copied stops plain passes too.
        raise
    except Exception as failure:
        # Any network may fail in any way on rows that it does not expect. One plain
        # pass per draw may still succeed.
        return f"{type(failure).__name__}: {failure}"
    size, ulp = _largest(expected[expected.isfinite()]), resolution(model)
    # Kernels for other batch sizes round differently. The limit follows the rounding
    # that was seen, from a floor of 2 ulp up to a ceiling of half the digits.
    limit = min(max(8 * rounding, 2 * ulp * (1 + size)), ulp**0.5 * (1 + size))
    if error > limit:
        return f"its predictions would differ by {error:.2g}"
    # Three gates that give the same predictions prove nothing, as while B = 0.
    moved = (expected - expected[0]).nan_to_num(0.0, 0.0, 0.0)
    return "" if _largest(moved) > 8 * limit else None


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference; infinite where one is finite and the other is not."""
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return math.inf
    return _largest((found - expected)[finite])


def looped(
    model: RankModel, values: Sequence[Tensor] | Tensor, batch: _Inputs
) -> Tensor:
    """The predictions under each draw, by one pass of the whole network per draw."""
    return torch.stack([_bound(model, value, batch) for value in values])


def fanned_out(model: RankModel, values: Tensor, batch: _Inputs, copies: int) -> Tensor:
    """The predictions under each draw: the first alone, then ``copies`` at a time."""
    prefix = Prefix(model.space)
    with prefix.recording():
        outputs = [_bound(model, values[0], batch)[None]]
    for chunk in values[1:].split(copies):
        with prefix.replaying():
            outputs.append(_stacked(model, chunk, batch))
    return torch.cat(outputs)


def _takes_rows(model: RankModel) -> bool:
    """Whether a pass may hold several draws: gates, and no DoRA layer."""
    return model.binds == "gates" and not model.space.dora


def _bound(model: RankModel, value: Tensor, batch: _Inputs) -> Tensor:
    with model.bind(value):
        return model.predictions(**batch)


def _stacked(model: RankModel, values: Tensor, batch: _Inputs) -> Tensor:
    """One pass for several draws, ``c x B x ...``."""
    if len(values) == 1:
        return _bound(model, values[0], batch)[None]
    copies, size = len(values), batch_size(batch)
    rows = with_rows(batch, size, lambda t: t.repeat(copies, *[1] * (t.dim() - 1)))
    output = _bound(model, values.repeat_interleave(size, 0), rows)
    return output.view(copies, size, *output.shape[1:])


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
