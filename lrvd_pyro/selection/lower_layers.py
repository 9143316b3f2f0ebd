"""Freeing the lowest layers of their ranks, so that they need no backward pass."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.selection.removal import check_pair, select

__all__ = ["free_lower_layers"]


def free_lower_layers(
    model: RankModel,
    guide: RankGuide,
    optimizer: Optimizer | None = None,
    *,
    hankel_values: Mapping[str, Tensor] | None = None,
    share: float = 1 / 3,
    layers: int | None = None,
) -> Tensor:
    """Remove all ranks of the lowest layers that carry little, as `select` does.

    The sum of ``t_i^2`` over all modules, in nats per data set, measures what the
    adapter carries. The lowest layers go that together hold at most ``share`` of it;
    the highest layer stays. Or a given number of layers goes, whatever they hold: the
    cost is then known beforehand.

    From then on, no layer below the first with a rank keeps activations or has a
    backward pass, unless inputs require a gradient
    (``net.disable_input_require_grads()``). A step costs less than one of plain LoRA,
    and `predict` runs those layers once for all draws. The other layers have to learn
    what was removed, so call it early. After `gauge.center` they have less to learn,
    since means stay.

    Layers are told by the first number in a module's name. Modules without a number
    count as the highest layer. Layers of an encoder and a decoder that share a number
    go together.

    Example::

        gather = BalanceSchedule(model, guide, svi.optim, every=10**9)
        for step, batch in enumerate(loader, 1):
            svi.step(**batch)
            gather.step()
            if step == 50:
                found = gather.gramians()
                center(model, found)
                sizes = hankel_values(found.centered())
                free_lower_layers(model, guide, svi.optim, hankel_values=sizes)
                gather.close()

    Args:
        model: The model in training.
        guide: Its guide, a `RankGuide`.
        optimizer: What trains them, as in `prune`.
        hankel_values: t of each module, ``r``, from `gauge.hankel_values`; None where
            ``layers`` is given.
        share: The largest share of ``sum t_i^2`` to remove, from 0 to below 1.
        layers: How many layers to free; None goes by ``share``.

    Returns:
        Which components stayed, bool (R,), R as before.

    Raises:
        TypeError: If the values are not a mapping, or a layer is a DoRA layer.
        ValueError: If ``share`` or ``layers`` is out of range; or if the values belong
            to other modules, are not finite, or are all 0.
        Also raises whatever `select` raises; nothing has changed then.

    Wrong as a guarantee: a share of a sum that is far from converged is a rule of
    thumb, not a theorem. Compare the accuracy with that of a run without, as
    ``examples/benchmarks/whole_run.py`` does.

    Source: freezing lower layers early, Brock et al. (2017, arXiv 1706.04983); which
    ones, by the balanced singular values, derived here.
    """
    check_pair(model, guide)
    if dora := model.space.dora:
        raise TypeError(
            f"the DoRA layer {dora[0]!r} cannot be left without a rank; use plain LoRA "
            f"(LoraConfig(use_dora=False))"
        )
    layer = torch.tensor(model.space.coordinates["layer"])
    # -1 marks a module without a number: a pooler or a head, above all layers.
    layer[layer < 0] = layer.max() + 1
    numbers = layer.unique()
    if layers is None:
        energy = _energy(model, hankel_values, share)
        below = [energy[layer <= n].sum() for n in numbers[:-1]]
        layers = sum(bool(part <= share * energy.sum()) for part in below)
    if layers not in range(len(numbers)):
        raise ValueError(
            f"layers={layers}; expected 0 to {len(numbers) - 1}: {len(numbers)} layers "
            f"have ranks, and the highest stays"
        )
    keep: Tensor = layer >= numbers[int(layers)]
    select(model, guide, optimizer, keep=keep)
    return keep


def _energy(
    model: RankModel, hankel_values: Mapping[str, Tensor] | None, share: float
) -> Tensor:
    """``t^2`` of each component, (R,); raises unless shares of their sum make sense."""
    space = model.space
    if not 0 <= share < 1:
        raise ValueError(f"share={share}; expected a number from 0 to below 1")
    if not isinstance(hankel_values, Mapping):
        raise TypeError(
            f"hankel_values is of type {type(hankel_values).__name__}; expected t by "
            f"module, hankel_values(gramians(model, batches)), or layers=1"
        )
    given = {name: len(t) for name, t in hankel_values.items()}
    if given != dict(zip(space.modules, space.ranks, strict=True)):
        raise ValueError(
            "the Hankel values are of other LoRA modules or ranks; take them again: "
            "hankel_values(gramians(model, batches))"
        )
    total = float(sum(t.abs().sum() for t in hankel_values.values()))
    if not 0 < total < float("inf"):
        raise ValueError(
            f"the Hankel values sum to {total}; expected finite values, not all 0. "
            f"Nothing was gathered, or no module's B has moved yet; train first"
        )
    return torch.cat([hankel_values[name].cpu().square() for name in space.modules])
