"""Batches as their single examples, where a layer mixes the rows of examples."""

import warnings
import weakref
from collections.abc import Iterable, Iterator

import torch

from lrvd_pyro.autocast import autocast_dtype
from lrvd_pyro.batches import Batch, batch_size, without_labels
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.inputs import with_rows

__all__ = ["resolution", "separable"]

# By model: the reasons for which its examples were seen to run alone. The keys are
# weak, so that this does not keep a network in memory.
_alone: weakref.WeakKeyDictionary[RankModel, set[str]] = weakref.WeakKeyDictionary()


def separable(model: RankModel, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, in which an example's gates move its own predictions only.

    A batch whose rows the network mixes comes as its examples one at a time: all rows
    of a pass then belong to one example. That is exact and slower, and one warning a
    model says so.

    Args:
        model: The model.
        batches: Batches of the data.

    Raises:
        ValueError: If an example alone has other predictions than in its batch, or the
            network has DoRA layers.
    """
    for batch in batches:
        reason = model.mixed_rows(batch)
        if not reason:
            yield batch
            continue
        if model.space.dora:
            raise ValueError(f"{reason}; use plain LoRA: LoraConfig(use_dora=False)")
        singles = [_single(batch, i) for i in range(batch_size(batch))]
        known = _alone.setdefault(model, set())
        if reason not in known:
            _require_alone(model, batch, singles[-1], reason)
            known.add(reason)
            warnings.warn(
                f"{reason}; the examples run one at a time instead, which is exact and "
                f"slower",
                stacklevel=3,
            )
        yield from singles


def _single(batch: Batch, index: int) -> Batch:
    """One example as a batch."""
    size = batch_size(batch)
    return with_rows(batch, size, lambda rows: rows[index : index + 1])


@torch.no_grad()
def _require_alone(model: RankModel, batch: Batch, last: Batch, reason: str) -> None:
    """Raise unless the last example has the same predictions alone as in its batch."""
    together = model.predictions(**without_labels(batch))
    alone = model.predictions(**without_labels(last))
    limit = resolution(model) ** 0.5 * (1 + together.abs().max())
    if alone.shape == together[-1:].shape:
        if bool((alone - together[-1:]).abs().max() <= limit):
            return
    raise ValueError(
        f"{reason}. An example alone has other predictions, so that no gate belongs to "
        f"one example; give each example a network pass of its own (batches of one), "
        f'or use what takes one draw for all: predict(..., method="sample")'
    )


def resolution(model: RankModel) -> float:
    """The coarsest relative precision at work in the network."""
    device = model.space.device.type
    parameters = model.base_net.parameters()
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if dtype := autocast_dtype(device):
        dtypes.add(dtype)
    # Below "highest", torch may round float32 factors to TF32, of 10 mantissa bits.
    exact = torch.get_float32_matmul_precision() == "highest"
    return max(0.0 if exact else 2**-10, *(torch.finfo(d).eps for d in dtypes))
