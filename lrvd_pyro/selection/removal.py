"""Removal of rank components from network, guide, prior and optimizer at once."""

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

__all__ = ["check_pair", "prior_cuts", "select"]


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
    the prior with one entry per component. Logits change as by setting those gates to
    0. Modules without rank leave the adapter, the optimizer and Pyro's store. Gates
    about a center (`gauge.center`) and PEFT's ``lora_bias`` leave a constant bias
    behind.

    Call it between steps: a loss computed before cannot go backward after it. Without
    ``optimizer``, a later step of one that still has the old moments is an error.

    Example::

        select(model, guide, svi.optim, keep=guide.log_alpha <= 3)

    Args:
        model: A `GateLoRA` or `FactorLoRA`.
        guide: Its guide, a `RankGuide`.
        optimizer: What trains them: of this library, Pyro or torch. None if nothing
            does.
        keep: Which components stay, bool (R,).

    Raises:
        TypeError: If the guide is not a `RankGuide`, or the optimizer's state cannot be
            sliced. If a latent site or a prior parameter cannot be assigned to
            components, or the prior does not follow its rank space.
        ValueError: If ``keep`` is not a mask that keeps something, or a DoRA layer
            would be left without rank. If guide or optimizer belong to another model.
        RuntimeError: If the adapter is merged, disabled, inactive or deleted.

    Wrong as a way to compare objectives: the objective under `LogUniform` is defined up
    to a constant per gate, which differs after a removal.
    """
    check_pair(model, guide)
    # All refusals come before the first tensor changes.
    cuts = model.space.cuts(keep) | guide.cuts(keep)
    of_prior = prior_cuts(model, keep)
    cuts |= of_prior
    if optimizer is not None:
        check_state(optimizer, cuts)
    if keep.all():
        return
    _check_prior(model, keep, of_prior)
    trained: set[Tensor] = set(model.base_net.parameters())
    # The space comes last: the guide finds its components by the old numbering.
    guide.select(keep)
    slice_tensors(of_prior)
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


def prior_cuts(model: RankModel, keep: Tensor) -> Cuts:
    """The cuts of the prior's own tensors that have an entry per rank or per group.

    Raises:
        TypeError: If a tensor cannot be assigned to components.
    """
    prior = model.prior
    if not isinstance(prior, nn.Module):
        return {}
    tensors = [*prior.named_parameters(), *prior.named_buffers()]
    return {
        tensor: (0, model.space.indices_kept(keep, name, len(tensor)))
        for name, tensor in tensors
        if tensor.dim() > 0
    }


def _check_prior(model: RankModel, keep: Tensor, cuts: Cuts) -> None:
    """Raise unless the prior, run on the ranks that stay, draws what the guide will."""
    if not isinstance(model, GateLoRA):
        return
    space = model.space
    expected = {
        name: len(space.indices_kept(keep, name, fn.event_shape[0]))
        for name, fn in model.latent_sites().items()
    }
    before = {tensor: tensor.data for tensor in cuts}
    # A prior is any program, so whether it follows can only be seen by running it. Its
    # tensors are sliced for the run and restored in any case.
    try:
        slice_tensors(cuts)
        with torch.no_grad(), torch.random.fork_rng(), poutine.block():
            with poutine.trace() as run:
                gate = model.prior(space.after(keep))
        sites = latent_sites(run.trace).items()
        sizes = {name: site["fn"].event_shape[0] for name, site in sites}
        problem = f"it draws {sizes} and a gate of {len(gate)}"
    except (RuntimeError, ValueError, IndexError) as error:
        sizes, problem = {}, f"it fails: {error}"
    finally:
        for tensor, data in before.items():
            replace_data(tensor, data)
    if sizes != expected or len(gate) != int(keep.sum()):
        raise TypeError(
            f"the prior does not follow its rank space to {int(keep.sum())} rank "
            f"components: {problem}; expected {expected}. In the prior, take all "
            f"sizes from space.size and space.group(level)"
        )
