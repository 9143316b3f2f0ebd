"""Checkpoints: a training run on disk, which goes on bit for bit after a kill."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pyro
import torch
from torch import nn

from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage.fit import refuse_infinite
from lrvd_pyro.storage.random_state import random_state, set_random_state
from lrvd_pyro.storage.transaction import told_of, unchanged_on_error
from lrvd_pyro.training import tree_file
from lrvd_pyro.training.earlier import brought_up
from lrvd_pyro.training.kinds import Stateful, check_kinds, kinds_of, listed
from lrvd_pyro.training.moments import check_moments
from lrvd_pyro.training.optimizer_state import (
    check_optimizer,
    load_optimizer,
    optimizer_state,
)
from lrvd_pyro.training.run_state import check_form, check_tensors
from lrvd_pyro.training.sampler import ResumableSampler
from lrvd_pyro.training.tensors import (
    Layout,
    base_of,
    check_layout,
    compare_base,
    layout_of,
    ranks_left,
    room_for_centers,
    stored_tensors,
)

__all__ = ["checkpoint", "resume"]


def checkpoint(
    path: str | os.PathLike[str],
    *,
    model: RankModel,
    guide: nn.Module,
    optimizer: Optimizer,
    elbo: RankELBO,
    sampler: Stateful | None = None,
    schedule: Stateful | Sequence[Stateful] | None = None,
    extra: object = None,
) -> None:
    """Write all that `resume` needs to go on bit for bit, in one safetensors file.

    The file holds

    - the trainable and adapter parameters, and the buffers, of network, prior,
      likelihood and guide; of the frozen base only its fingerprint;
    - which rank components are left;
    - the optimizer's moments and rates, and ``elbo.step``;
    - the states of sampler and schedule;
    - the global random number generators of torch (CPU, and CUDA where used), NumPy and
      Python.

    A kill at any moment leaves the previous file or the new one.

    Example::

        run = dict(model=model, guide=guide, optimizer=svi.optim, elbo=elbo,
                   sampler=sampler, schedule=schedule)
        if path.exists():
            resume(path, **run)
        while sampler.epoch < 3:
            for index in sampler.batches(32):
                svi.step(**{k: v[index] for k, v in train.items()})
                schedule.step()
                if elbo.step % 100 == 0:
                    checkpoint(path, **run)

    Wrong between a backward pass and the optimizer's step: gradients are not stored.

    Args:
        path: The file, by convention ``.safetensors``; replaced if it exists.
        model: The model in training.
        guide: Its guide, a module.
        optimizer: `lrvd_pyro.optim.AdamW` (under SVI, ``svi.optim``) or one of torch.
        elbo: The loss.
        sampler: The place in the data: a `ResumableSampler`.
        schedule: A `RankSchedule`, a scheduler, a `RankHistory`, or a list of them.
        extra: Dicts, lists and tuples of numbers, texts and tensors. `resume` returns
            it, with tensors on the CPU.

    Raises:
        TypeError: If guide, optimizer, elbo or a state cannot be stored.
        ValueError: If the guide has no parameters yet; if a tensor of model or guide
            or a moment has NaN or infinity; if the optimizer holds other
            parameters, or a restored state that no step has used yet; or if ``path`` is
            a folder.
        OSError: If the disk is full or read-only; ``path`` stays as it was.
    """
    kinds = kinds_of(model, guide, optimizer, elbo, sampler, schedule)
    tensors = stored_tensors(model, guide)
    refuse_infinite(tensors)
    space = model.space
    state: dict[str, Any] = {
        "kinds": kinds,
        "ranks": {
            "modules": space.modules,
            "ranks": space.ranks,
            "origin": space.origin,
        },
        "layout": (layout := layout_of(tensors, {})),
        "base": base_of(model),
        "tensors": tensors,
        "linearized_scale": getattr(guide, "linearized_scale", 1.0),
        "optimizer": optimizer_state(optimizer, tensors),
        "elbo": elbo.state_dict(),
        "sampler": None if sampler is None else sampler.state_dict(),
        "schedule": [each.state_dict() for each in listed(schedule)],
        "random": random_state(),
        "extra": extra,
    }
    # What resume would refuse must not replace a file that it takes.
    check_moments(Path(path), optimizer, layout, state["optimizer"])
    tree_file.write(Path(path).resolve(), state)


def resume(
    path: str | os.PathLike[str],
    *,
    model: RankModel,
    guide: nn.Module,
    optimizer: Optimizer,
    elbo: RankELBO,
    sampler: Stateful | None = None,
    schedule: Stateful | Sequence[Stateful] | None = None,
    check_base: bool = True,
) -> Any:
    """Restore what `checkpoint` wrote into objects made as for that run.

    The objects may be new, or those of the run itself at an earlier moment: rank
    components that the run had removed are removed first. Arguments of constructors,
    functions among them, come from the objects and not from the file.

    The run goes on bit for bit on the CPU, with the same versions and number of
    threads.

    Wrong where CUDA devices were used and are not there: the noise then differs.

    Example::

        best = resume("run.safetensors", model=model, guide=guide,
                      optimizer=svi.optim, elbo=elbo, sampler=sampler)

    Args:
        path: The file.
        model: The model, as `checkpoint` was given it.
        guide: Its guide.
        optimizer: The optimizer, of the same kind.
        elbo: The loss.
        sampler: The sampler, if there was one.
        schedule: The schedules, of the same kinds and in the same order.
        check_base: Whether to compare names, shapes and values of the frozen base with
            those of the run. False goes on with any base to which the adapter fits.

    Returns:
        The ``extra`` of `checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or has a newer format; if it is from another
            base, model, guide or optimizer; or if other objects are given. Network,
            guide, optimizer and generators have not changed then.
        TypeError: If guide, optimizer, elbo or a state are of a kind that `checkpoint`
            refuses.
        RuntimeError: If ranks were removed and the adapter is merged or disabled.

    Warns:
        UserWarning: If the file is of an earlier version, without a hash.
    """
    path = Path(path).resolve()
    kinds = kinds_of(model, guide, optimizer, elbo, sampler, schedule)
    stored_tensors(model, guide)  # refuses a wrong pair before the file is opened
    state, version = tree_file.read(path)
    schedules = listed(schedule)
    check_kinds(path, state, kinds)
    state = brought_up(path, state, version)
    check_form(path, state, sampler=sampler, schedules=schedules)
    layout: Layout = state["layout"]
    check_tensors(path, state["tensors"], layout)
    check_moments(path, optimizer, layout, state["optimizer"])
    store = pyro.get_param_store()
    run = model, guide, optimizer, elbo, sampler, *schedules, store
    values = stored_tensors(model, guide).values()
    with unchanged_on_error(*run, values=values), told_of(path):
        room_for_centers(model, layout)
        present = stored_tensors(model, guide)
        keep = ranks_left(path, model, state["ranks"])
        staying = check_layout(path, model, guide, keep, present, layout)
        if check_base:
            compare_base(path, model, state["base"])
        # A bias that became a constant stays with the model and left the optimizer.
        trains = {name for name, (*_, trains) in layout.items() if trains}
        still = {n: t for n, t in staying.items() if n in trains or not t.requires_grad}
        check_optimizer(path, optimizer, present, still, state["optimizer"])
        if isinstance(sampler, ResumableSampler):
            sampler.check(state["sampler"])
        if not keep.all():
            select(model, cast(RankGuide, guide), optimizer, keep=keep)
        model.space.origin = state["ranks"]["origin"]
        with torch.no_grad():
            # In place, since Pyro's store and the optimizer train these very tensors.
            for name, tensor in staying.items():
                tensor.copy_(state["tensors"][name])
        if isinstance(guide, RankGuide):
            guide.linearized_scale = state["linearized_scale"]
        load_optimizer(optimizer, staying, state["optimizer"])
        elbo.load_state_dict(state["elbo"])
        if sampler is not None:
            sampler.load_state_dict(state["sampler"])
        for each, saved in zip(schedules, state["schedule"], strict=True):
            each.load_state_dict(saved)
        # Last, since a user's own load_state_dict may draw.
        set_random_state(state["random"])
    return state["extra"]
