"""The balanced gauge, in which both second moments of a module are one diagonal."""

from typing import Literal, NamedTuple, get_args

import torch
from peft import PeftModel
from torch import Tensor

from lrvd_pyro.gauge.second_moments import Gramians
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.rank_space.center import center_at, center_of, check_center
from lrvd_pyro.rank_space.constant import groups_of
from lrvd_pyro.rank_space.space import RankSpace
from lrvd_pyro.selection.optimizer_moments import optimizers_of

__all__ = ["Change", "balance", "check_fit", "hankel_values", "rebalance"]

_Lengths = Literal["balanced", "kept"]
_FLOOR = 1e-12  # of a Gramian's eigenvalues, relative to the largest
_DEAD = 1e-3  # of a module's Hankel values, relative to the largest: directions only

# An optimizer's moments by the power of the gradient that they average.
_LINEAR = ["exp_avg", "momentum_buffer"]
_SQUARED = ["exp_avg_sq", "max_exp_avg_sq"]


class Change(NamedTuple):
    """A change of basis: A becomes ``forward @ A`` and B becomes ``B @ backward``.

    Attributes:
        forward: T, ``r x r`` in float64.
        backward: T^-1, ``r x r`` in float64.
    """

    forward: Tensor
    backward: Tensor


def hankel_values(gramians: Gramians) -> dict[str, Tensor]:
    """The balanced singular values t of each module, descending, ``r`` in float64.

    ``t_i^2`` are the eigenvalues of ``G M``, in nats per data set. If tokens were
    independent, they would be what component i of the balanced gauge adds to the Fisher
    information. The values do not depend on the gauge: A -> T A, B -> B T^-1 leaves
    them as they are. They are the singular values of the whitened update
    ``H^1/2 dW S^1/2``. S are the second moments of its inputs, and H those of the
    gradients of its outputs.

    Example::

        t = hankel_values(gramians(model, batches))[model.space.modules[0]]

    Args:
        gramians: The second moments, from `lrvd_pyro.gauge.gramians`.

    Returns:
        t by module.

    Source: as Hankel singular values of a linear system, Moore (1981); for a LoRA
    adapter, derived here.
    """
    # t are the singular values of R^T L, with M = R R^T and G = L L^T. The eigenvalues
    # of G M would square the condition number.
    return {
        name: torch.linalg.svdvals(
            _root(gradients).T @ _root(gramians.activations[name])
        )
        for name, gradients in gramians.gradients.items()
    }


def balance(
    net: PeftModel,
    gramians: Gramians,
    optimizer: Optimizer | None = None,
    *,
    lengths: _Lengths = "balanced",
    adapter: str | None = None,
) -> dict[str, Change]:
    """Move A and B of every module to the balanced gauge; the function stays.

    ``A -> T A``, ``B -> B T^-1`` with ``T G T^T = T^-T M T^-1 = diag(t)``. The order is
    by falling t. In each row of A the entry of largest size is positive, so that two
    runs compare.

    Theory fixes only directions. Components with ``t_i < 1e-3 max t`` get rows of A as
    long as the module's rows were (root mean square). B has the rest, so that no rank
    dies. With ``lengths="kept"`` all components get such rows. T G T^T and T^-T M T^-1
    are then diagonal with the product diag(t^2), and learning rates fit as they did. A
    module stays as it is while its B, or one of its second moments, is 0.

    Adam's first moments, and momentum, are carried into the new basis exactly. Adam's
    second moments are carried as if the entries' gradients were uncorrelated. A guide
    is not carried along. Its variances, and means if learned, belong to the old
    components; `optimal_alpha` gives the new ones.

    Example::

        balance(net, gramians(model, batches), optimizer, lengths="kept")

    Args:
        net: The PEFT model that the second moments were taken from, unchanged since.
        gramians: The second moments of that model.
        optimizer: What trains it, of this library, Pyro or torch; None if nothing does.
        lengths: "balanced", or "kept" for an adapter that trains on.
        adapter: The adapter's name; None takes the single active one.

    Returns:
        The change of basis of each module that moved, in float64.

    Raises:
        TypeError: If a module is a grouped convolution, or the optimizer's state is not
            that of Adam, AdamW or SGD.
        ValueError: If the second moments belong to other modules or ranks, or the
            optimizer to another network. If ``lengths`` is neither of the two.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted. After
            any error, no module has changed.

    Wrong with weight decay or a ``weight_prior``, which are not the same in all gauges:
    the objective changes, though the function stays.

    Source: balanced realization, Moore (1981), by the square-root method of Tombs and
    Postlethwaite (1987); for LoRA, derived here.
    """
    space = RankSpace(net, adapter)
    try:
        return rebalance(space, gramians, optimizer, lengths)
    finally:
        space.close()


@torch.no_grad()
def rebalance(
    space: RankSpace, gramians: Gramians, optimizer: Optimizer | None, lengths: _Lengths
) -> dict[str, Change]:
    """`balance` for a network that has its `RankSpace` already."""
    if lengths not in get_args(_Lengths):
        raise ValueError(f'lengths={lengths!r}; expected "balanced" or "kept"')
    space.require_live()
    check_fit(space, gramians)
    _check_mixable(space)
    weights = dict(
        zip(space.modules, zip(space.weights("lora_A"), space.weights("lora_B")))
    )
    changes = {}
    for name, (a, b) in weights.items():
        both = gramians.activations[name], gramians.gradients[name]
        if b.any() and all(gram.any() for gram in both):
            changes[name] = _change(*both, a, _DEAD if lengths == "balanced" else 1)
    # The optimizer and the center are checked before the first weight moves.
    states = _states(optimizer, [w for name in changes for w in weights[name]])
    point = _moved_center(space, changes)
    for name, (forward, backward) in changes.items():
        a, b = weights[name]
        _mix_rows(a, forward)
        _mix_columns(b, backward)
        # The function stays, so gradients of A mix by T^-T and those of B by T^T.
        for key, value in states.get(a, {}).items():
            _mix_rows(value, _power(backward.T, key))
        for key, value in states.get(b, {}).items():
            _mix_columns(value, _power(forward.T, key))
    if point is not None:
        center_at(space, point)
    return changes


def _root(gramian: Tensor, floor: float = 0.0) -> Tensor:
    """L with ``L L^T`` the Gramian, its eigenvalues raised to ``floor`` x the largest.

    A Cholesky factor would fail on inputs that span fewer dimensions than ranks.
    """
    values, vectors = torch.linalg.eigh((gramian + gramian.T) / 2)
    values = values.clamp(min=floor * float(values[-1].clamp(min=0)))
    result: Tensor = vectors * values.sqrt()
    return result


def _change(
    activations: Tensor, gradients: Tensor, lora_A: Tensor, dead: float
) -> Change:
    """The change to the balanced gauge of one module.

    Args:
        activations: G, ``r x r``.
        gradients: M, ``r x r``.
        lora_A: ``r x in``, or as the layer has it.
        dead: Components with t up to ``dead`` times the largest keep their length.
    """
    lower = _root(activations, _FLOOR)
    _, t, right = torch.linalg.svd(_root(gradients).T @ lower)
    # Rows of ``whiten`` turn h into components of unit mean square, by falling t.
    whiten, unwhiten = right @ torch.linalg.inv(lower), lower @ right.T
    before = lora_A.double().flatten(1).cpu()
    rows = whiten @ before
    lengths = rows.norm(dim=1)
    typical = before.norm(dim=1).square().mean().sqrt()
    # A row of zeros, as a padded export has it, cannot be given a length.
    kept = torch.where(lengths > 0, typical / lengths, 1 / whiten.norm(dim=1))
    # A component of tiny t would get a tiny row of A and a tiny column of B. Both then
    # train slowly, the gradient of each being proportional to the other: the rank dies.
    size = torch.where(t > dead * t[0], t.sqrt(), kept)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True)).squeeze(1)
    size = size * torch.where(largest < 0, -1.0, 1.0)
    return Change(size[:, None] * whiten, unwhiten / size)


def _moved_center(space: RankSpace, changes: dict[str, Change]) -> Tensor | None:
    """The center of the gates in the new basis, (R,), checked; None without center."""
    points = {name: point.double().cpu() for name, point in center_of(space).items()}
    if not points:
        return None
    points |= {name: changes[name].forward @ points[name] for name in changes}
    moved = torch.cat([points[name] for name in space.modules])
    check_center(space, moved)
    return moved


def _mix_rows(tensor: Tensor, matrix: Tensor) -> None:
    mixed = matrix.to(tensor.device) @ tensor.double().flatten(1)
    tensor.copy_(mixed.view_as(tensor))


def _mix_columns(tensor: Tensor, matrix: Tensor) -> None:
    mixed = tensor.double().movedim(1, -1) @ matrix.to(tensor.device)
    tensor.copy_(mixed.movedim(-1, 1))


def _power(matrix: Tensor, key: str) -> Tensor:
    """How an optimizer's moment mixes when gradients mix by ``matrix``."""
    # The variance of a sum of uncorrelated terms: squared weights, never negative.
    return matrix if key in _LINEAR else matrix.square()


def _states(
    optimizer: Optimizer | None, weights: list[Tensor]
) -> dict[Tensor, dict[str, Tensor]]:
    """The optimizer's moments of these weights, by name, all checked."""
    if optimizer is None:
        return {}
    states = {}
    for optim in optimizers_of(optimizer, weights, "LoRA weight of this network"):
        for weight in optim.state.keys() & set(weights):
            moments = {
                key: value
                for key, value in optim.state[weight].items()
                if isinstance(value, Tensor) and value.dim() > 0
            }
            for key, value in moments.items():
                if key not in _LINEAR + _SQUARED or value.shape != weight.shape:
                    raise TypeError(
                        f"{type(optim).__name__} keeps {key!r}, whose change with the "
                        f"basis is not known; use Adam, AdamW or SGD, or "
                        f"balance(net, gramians) and start a new optimizer"
                    )
            states[weight] = moments
    return states


def check_fit(space: RankSpace, gramians: Gramians) -> None:
    """Raise a ValueError unless the second moments are of these modules and ranks."""
    given = {name: len(gram) for name, gram in gramians.gradients.items()}
    expected = dict(zip(space.modules, space.ranks, strict=True))
    if not given:
        raise ValueError(
            "the Gramians hold no second moments to balance by: gates were drawn as "
            "subsets; take them at gates of 1: gramians(model, batches)"
        )
    if given != expected:
        differing = sorted(given.items() ^ expected.items())
        raise ValueError(
            f"the Gramians are of other LoRA modules or ranks, such as {differing[0]}; "
            f"take them again: gramians(model, batches)"
        )


def _check_mixable(space: RankSpace) -> None:
    """Raise a TypeError unless rank components of every module can be mixed."""
    # A group of a convolution sees its own ranks only: they cannot trade places.
    for name, layer in zip(space.modules, space.layers, strict=True):
        if groups_of(layer, space.adapter) > 1:
            raise TypeError(
                f"{name!r} is a grouped convolution, whose ranks are tied to its "
                f"groups; leave it out of target_modules, or call "
                f"bayesianize(..., balance=False)"
            )
