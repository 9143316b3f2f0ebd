"""Removal of rank components from network, guide, prior and optimizer at once."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro import poutine
from torch import Tensor

from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors, sliced_for_a_trial
from lrvd_pyro.rank_space.space import RankSpace
from lrvd_pyro.selection.optimizer_moments import (
    check_state,
    select_state,
    watch_for_stale_state,
)

__all__ = ["check_pair", "select"]


def select(
    model: RankModel,
    guide: RankGuide,
    optimizer: Optimizer | None = None,
    *,
    keep: Tensor,
) -> None:
    """Remove the rank components where ``keep`` is False, all over or nowhere.

    Rows of A, columns of B, the guide's entries and the optimizer's moments are sliced
    in place, so that whoever trains them continues. So are parameters and buffers of
    the model and its prior with one entry per component. Logits change as by setting
    those gates to 0. Modules without rank leave the adapter, the optimizer and Pyro's
    store. Gates about a center (`gauge.center`) and PEFT's ``lora_bias`` leave a
    constant bias behind.

    Call it between steps: a loss computed before cannot go backward after it. Without
    ``optimizer``, a later step of one that still has the old moments is an error.

    Example::

        select(model, guide, svi.optim, keep=guide.log_alpha <= 3)

    Args:
        model: A `GateLoRA`, a `FactorLoRA`, or a `RankModel` of your own.
        guide: Its guide, a `RankGuide`.
        optimizer: What trains them: of this library, Pyro or torch. None if nothing
            does.
        keep: Which components stay, bool (R,).

    Raises:
        TypeError: If the guide is not a `RankGuide`, or the optimizer's state cannot be
            sliced. If a latent site, parameter or buffer cannot be assigned to
            components, or the model's draw does not follow its rank space.
        ValueError: If ``keep`` is not a mask that keeps something, or a DoRA layer
            would be left without rank. If guide or optimizer belong to another model.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.

    Wrong as a way to compare objectives: the objective under `LogUniform` is defined up
    to a constant per gate, which differs after a removal.
    """
    check_pair(model, guide)
    # All refusals come before the first tensor changes.
    of_net = model.space.cuts(keep)
    model.latent_sites()  # a prior may make its tensors when it first runs
    of_model, of_guide = model.cuts(keep), guide.cuts(keep)
    cuts = of_net | of_model | of_guide
    if optimizer is not None:
        check_state(optimizer, cuts)
    if keep.all():
        return
    _check_follows(model, guide, keep, of_net | of_model)
    # The guide cuts what it shares with the model.
    of_model = {t: cut for t, cut in of_model.items() if t not in of_guide}
    trained: set[Tensor] = set(model.base_net.parameters())
    # The space comes last: the guide finds its components by the old numbering.
    guide.select(keep)
    slice_tensors(of_model)
    model.space.select(keep)
    gone = trained - set(model.base_net.parameters())
    if optimizer is None:
        watch_for_stale_state()
    else:
        select_state(optimizer, cuts, gone)
    # Pyro's store would keep the parameters of removed modules alive.
    store = pyro.get_param_store()
    for name in filter(None, map(store.param_name, gone)):
        del store[name]


def check_pair(model: RankModel, guide: RankGuide) -> None:
    """Raise unless ``guide`` is a `RankGuide` of this model.

    Raises:
        TypeError: If the guide is not a `RankGuide`.
        ValueError: If it belongs to another model, or was copied apart from this one.
    """
    if not isinstance(guide, RankGuide):
        raise TypeError(
            f"guide is a {type(guide).__name__}; expected a guides.RankGuide, which "
            f"has a noise of its own for each rank: RankDiagonal(model) for GateLoRA, "
            f"TiedDiagonal(model) for FactorLoRA"
        )
    if guide.paired_with(model) is not guide:
        raise ValueError(
            "guide and model were copied apart, so that a removal from one would not "
            "reach the other; copy both at once: copy.deepcopy((model, guide))"
        )


def _check_follows(
    model: RankModel, guide: RankGuide, keep: Tensor, cuts: Cuts
) -> None:
    """Raise unless model and guide can run on the ranks that stay.

    A prior, a draw or a guide is any program, so whether it follows can only be seen by
    running it: the model on sliced tensors, the guide as a copy.

    Args:
        model: The model.
        guide: Its guide.
        keep: Which components stay.
        cuts: Those of the adapter and of the model.
    """
    space, after = model.space, model.space.after(keep)
    expected = {}
    if model.binds == "gates":  # other sites may have any layout
        expected = {
            name: len(space.indices_kept(keep, name, fn.event_shape.numel()))
            for name, fn in model.latent_sites().items()
        }
    # The copy has the network in common, which a guide may reach by its model.
    trial = copy.deepcopy(guide, {id(space): space, id(model): model})
    of_guide: list[int] = []
    try:
        trial.select(keep)
        trial.space = after
        with sliced_for_a_trial(cuts), _as_if_in(model, after), torch.no_grad():
            sizes, ranks = _drawn_sizes(model)
            of_guide = [len(trial.log_alpha)]
            if model.binds == "gates":
                of_guide.append(len(trial.mean()))
        problem = f"it draws {sizes} for ranks {list(ranks.values())}"
    except Exception as error:  # of whatever the user wrote
        sizes, ranks, problem = {}, {}, f"it fails: {error!r}"
    wrong_sites = expected != {name: sizes.get(name) for name in expected}
    if wrong_sites or ranks != dict(zip(after.modules, after.ranks)):
        raise TypeError(
            f"{type(model).__name__} or its guide does not follow the rank space to "
            f"{after.size} rank components: {problem}; expected {expected or 'draws'} "
            f"for ranks {list(after.ranks)}. In draw, prior and guide, take all sizes "
            f"from space.size, space.ranks and space.group(level)"
        )
    if {*of_guide} != {after.size}:
        raise TypeError(
            f"{type(guide).__name__} does not follow the rank space to {after.size} "
            f"rank components: mean or log_alpha has {of_guide} entries; give it cuts "
            f"and select that cut all of its state"
        )


@contextmanager
def _as_if_in(model: RankModel, space: RankSpace) -> Iterator[None]:
    before, model.space = model.space, space
    try:
        yield
    finally:
        model.space = before


def _drawn_sizes(model: RankModel) -> tuple[dict[str, int], dict[str, int]]:
    """One draw's size of each latent site, and the rank that each module has by it."""
    with torch.random.fork_rng(), poutine.block(), pyro.get_param_store().scope():
        with poutine.trace() as run:
            factors = model.factors(model.draw())
    sites = latent_sites(run.trace).items()
    sizes = {name: site["fn"].event_shape.numel() for name, site in sites}
    return sizes, {name: len(each.gate) for name, each in factors.items()}
