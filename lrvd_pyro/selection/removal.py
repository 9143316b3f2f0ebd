"""Removing rank components from model, guide, prior and optimizer at once."""

import pyro
import torch
from pyro import poutine
from torch import Tensor, nn

from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.inference.kl import latent_sites
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.rank_space.removal import Cuts, replace_data, slice_tensors
from lrvd_pyro.selection.optimizer_moments import (
    check_state,
    select_state,
    watch_for_stale_state,
)


def select(
    model: RankModel,
    guide: RankGuide,
    optimizer: Optimizer | None = None,
    *,
    keep: Tensor,
) -> None:
    """Remove the rank components where ``keep`` (R,) is False, all over or nowhere.

    Rows of A, columns of B, the guide's entries, parameters and buffers of the prior
    with one entry per component, and the optimizer's moments are sliced in place, so
    that whoever trains them goes on. Logits change as by setting those gates to 0.
    Modules without rank leave the adapter, the optimizer and Pyro's store. Of gates
    about a center (`gauge.center`), and of PEFT's ``lora_bias``, a constant bias stays.

    Call it between steps: a loss computed before cannot go backward after it.

    Without ``optimizer``, a later step of one that still has the old moments is an
    error.

    Raises:
        TypeError: If the guide is not a `RankGuide`, a latent site or prior parameter
            belongs to no components that can be told, the prior does not follow its
            rank space, or the optimizer's state cannot be sliced.
        ValueError: If ``keep`` is no mask that keeps something, a DoRA layer would be
            left without rank, or guide or optimizer belong to another model.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.
    """
    check_pair(model, guide)
    cuts = model.space.cuts(keep) | guide.cuts(keep)
    ours = prior_cuts(model, keep)
    cuts |= ours
    if optimizer is not None:
        check_state(optimizer, cuts)
    if keep.all():
        return
    _check_prior(model, guide, keep, ours)
    trained: set[Tensor] = set(model.base_net.parameters())
    guide.select(keep)
    slice_tensors(ours)
    model.space.select(keep)
    gone = trained - set(model.base_net.parameters())
    if optimizer is None:
        watch_for_stale_state()
    else:
        select_state(optimizer, cuts, gone)
    store = pyro.get_param_store()
    for name in filter(None, map(store.param_name, gone)):
        del store[name]


def check_pair(model: RankModel, guide: RankGuide) -> None:
    """Raise unless ``guide`` is a `RankGuide` of this model."""
    if not isinstance(guide, RankGuide):
        raise TypeError(
            f"guide is a {type(guide).__name__}; ranks are selected under a "
            f"guides.RankGuide, which has a noise of its own for each: "
            f"RankDiagonal(model) for GateLoRA, TiedDiagonal(model) for FactorLoRA"
        )
    if guide.space is not model.space:
        raise ValueError(
            "the guide was built on another model; pass both as they were trained"
        )


def prior_cuts(model: RankModel, keep: Tensor) -> Cuts:
    """What the prior itself holds per rank component, or per group of them."""
    prior = model.prior
    if not isinstance(prior, nn.Module):
        return {}
    tensors = [*prior.named_parameters(), *prior.named_buffers()]
    return {
        tensor: (0, model.space.indices_kept(keep, name, len(tensor)))
        for name, tensor in tensors
        if tensor.dim() > 0
    }


def _check_prior(model: RankModel, guide: RankGuide, keep: Tensor, cuts: Cuts) -> None:
    """Raise unless the prior, run on the ranks that stay, draws what the guide will."""
    if not isinstance(model, GateLoRA):
        return
    space = model.space
    expected = {
        name: len(space.indices_kept(keep, name, fn.event_shape[0]))
        for name, fn in model.latent_sites().items()
    }
    before = {tensor: tensor.data for tensor in cuts}
    try:
        slice_tensors(cuts)
        with torch.no_grad(), torch.random.fork_rng(), poutine.block():
            with poutine.trace() as run:
                gate = model.prior(space.after(keep))
        sites = latent_sites(run.trace).items()
        found = {name: site["fn"].event_shape[0] for name, site in sites}
        problem = f"it draws {found} and a gate of {len(gate)}"
    except (RuntimeError, ValueError, IndexError) as error:
        found, problem = {}, f"it fails: {error}"
    finally:
        for tensor, data in before.items():
            replace_data(tensor, data)
    if found != expected or len(gate) != int(keep.sum()):
        raise TypeError(
            f"the prior does not follow its rank space to {int(keep.sum())} rank "
            f"components: {problem}; expected {expected}. Take sizes "
            f"from space.size and space.group(level), none from outside"
        )
