"""A training run on disk: killed at any moment, it goes on as if it never was."""

import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import nn

from lrvd_pyro.guides.base import RankGuide
from lrvd_pyro.inference.elbo import RankELBO
from lrvd_pyro.models.base import RankModel
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.selection.removal import select
from lrvd_pyro.training import tree_file
from lrvd_pyro.training.optimizer_state import (
    check_optimizer,
    load_optimizer,
    optimizer_state,
)
from lrvd_pyro.training.sampler import ResumableSampler
from lrvd_pyro.training.tensors import (
    base_of,
    check_base,
    check_layout,
    layout_of,
    ranks_left,
    room_for_centers,
    stored_tensors,
)


class Stateful(Protocol):
    """What saves and restores itself, as schedulers of torch do."""

    def state_dict(self) -> dict[str, Any]:
        """Dicts, lists and tuples of numbers, texts and tensors."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Go on where `state_dict` was taken."""


def checkpoint(
    path: str | os.PathLike[str],
    *,
    model: RankModel,
    guide: nn.Module,
    optimizer: Optimizer,
    elbo: RankELBO,
    sampler: Stateful | None = None,
    schedule: Stateful | Sequence[Stateful] | None = None,
    extra: Any = None,
) -> None:
    """Write all that `resume` needs to go on bit for bit, in one safetensors file.

    The file has trainable and adapter parameters, and buffers, of network, prior,
    likelihood and guide; which rank components are left; the optimizer's moments and
    rates; ``elbo.step``; the states of sampler and schedule; and the global random
    number generators of torch (CPU, and CUDA where used), NumPy and Python; of the
    frozen base only what tells it from another. A kill at any moment leaves the
    previous file or the new one.

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
        path: The file, conventionally ``.safetensors``; replaced if it exists.
        model: The model in training.
        guide: Its guide, a module.
        optimizer: `lrvd_pyro.optim.AdamW` (SVI's is ``svi.optim``) or one of torch.
        elbo: The loss.
        sampler: Where the data are: a `ResumableSampler`.
        schedule: A `RankSchedule`, a scheduler or `RankHistory`, or a list of them.
        extra: Dicts, lists and tuples of numbers, texts and tensors, which `resume`
            returns, tensors on the CPU.

    Raises:
        TypeError: If guide, optimizer, elbo or a state are of a kind that cannot be
            stored.
        ValueError: If the guide has no parameters yet, the optimizer holds others than
            theirs or an unused restored state, or ``path`` is a folder.
    """
    kinds = _kinds(model, guide, optimizer, elbo, sampler, schedule)
    tensors = stored_tensors(model, guide)
    space = model.space
    state = {
        "kinds": kinds,
        "ranks": {
            "modules": space.modules,
            "ranks": space.ranks,
            "origin": space.origin,
        },
        "layout": layout_of(tensors, {}),
        "base": base_of(model),
        "tensors": tensors,
        "optimizer": optimizer_state(optimizer, tensors),
        "elbo": elbo.state_dict(),
        "sampler": None if sampler is None else sampler.state_dict(),
        "schedule": [each.state_dict() for each in _listed(schedule)],
        "random": _random_state(),
        "extra": extra,
    }
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
) -> Any:
    """Restore what `checkpoint` wrote into objects made as for that run.

    Rank components that the run had removed are removed first, so that the objects may
    be as new, or those of the run itself at an earlier moment. Arguments of their
    constructors, functions among them, come from the objects and not from the file.

    Bit for bit holds on the CPU with the same versions and number of threads. Where
    CUDA devices were used and are not there, the run goes on with other noise.

    Returns:
        The ``extra`` of `checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of a newer format, from another base, model,
            guide or optimizer, or with other objects. Nothing has changed then.
        TypeError: As `checkpoint`.
        RuntimeError: If ranks were removed and the adapter is merged or disabled.
    """
    path = Path(path).resolve()
    kinds = _kinds(model, guide, optimizer, elbo, sampler, schedule)
    stored_tensors(model, guide)  # refuses the pair before the file is opened
    state, version = tree_file.read(path)
    if version == 1:
        state = _from_version_1(state)
    _check_kinds(path, state["kinds"], kinds)
    layout = state["layout"]
    with room_for_centers(model, layout):
        present = stored_tensors(model, guide)
        keep = ranks_left(path, model, state["ranks"])
        staying = check_layout(path, model, guide, keep, present, layout)
        check_base(path, model, state["base"])
        # a bias that became a constant left the optimizer, and stays
        trains = {name for name, (*_, trains) in layout.items() if trains}
        still = {n: t for n, t in staying.items() if n in trains or not t.requires_grad}
        check_optimizer(path, optimizer, present, still, state["optimizer"])
        if isinstance(sampler, ResumableSampler):
            sampler.check(state["sampler"])
    if not keep.all():
        select(model, cast(RankGuide, guide), optimizer, keep=keep)
    # Nothing below fails.
    model.space.origin = state["ranks"]["origin"]
    with torch.no_grad():
        for name, tensor in staying.items():
            tensor.copy_(state["tensors"][name])
    load_optimizer(optimizer, staying, state["optimizer"])
    elbo.load_state_dict(state["elbo"])
    if sampler is not None:
        sampler.load_state_dict(state["sampler"])
    for each, saved in zip(_listed(schedule), state["schedule"], strict=True):
        each.load_state_dict(saved)
    _set_random_state(state["random"])
    return state["extra"]


def _from_version_1(state: dict[str, Any]) -> dict[str, Any]:
    """Up to version 0.1 centers, and gradients of a BalanceSchedule, had other names."""

    def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
        ends = ".centre", ".center"
        return {
            n.removesuffix(ends[0]) + ends[1] if n.endswith(ends[0]) else n: t
            for n, t in tensors.items()
        }

    schedules = [
        {"gradients" if k == "scores" else k: v for k, v in each.items()}
        for each in state["schedule"]
    ]
    named = {name: renamed(state[name]) for name in ("layout", "tensors")}
    return state | named | {"schedule": schedules}


def _listed(schedule: Any) -> list[Stateful]:
    if schedule is None:
        return []
    return [*schedule] if isinstance(schedule, list | tuple) else [schedule]


def _kinds(
    model: Any, guide: Any, optimizer: Any, elbo: Any, sampler: Any, schedule: Any
) -> dict[str, list[str]]:
    """The classes of the objects under each argument.

    Raises:
        TypeError: If one has no state to store.
    """
    if not isinstance(elbo, RankELBO):
        raise TypeError(
            f"elbo is a {type(elbo).__name__}; expected the RankELBO itself, which "
            f"makes elbo(model, guide) and is SVI's loss"
        )
    given = {
        "model": [model],
        "guide": [guide],
        "optimizer": [optimizer],
        "sampler": [] if sampler is None else [sampler],
        "schedule": _listed(schedule),
    }
    for name in ("sampler", "schedule"):
        for each in given[name]:
            if not hasattr(each, "load_state_dict"):
                raise TypeError(
                    f"{name} is a {type(each).__name__} without state_dict and "
                    f"load_state_dict; expected lrvd_pyro's ResumableSampler or "
                    f"RankSchedule, or a scheduler of torch"
                )
    return {name: [_kind(each) for each in them] for name, them in given.items()}


def _kind(thing: Any) -> str:
    package = type(thing).__module__.partition(".")[0]
    return f"{package}.{type(thing).__qualname__}"


def _check_kinds(
    path: Path, saved: dict[str, list[str]], found: dict[str, list[str]]
) -> None:
    """Raise unless the same kinds of objects are given as were saved."""
    for name in saved:
        if saved[name] != found[name]:
            there, here = (", ".join(k[name]) or "None" for k in (saved, found))
            raise ValueError(
                f"{path} was written with {name}={there} and resume was given "
                f"{name}={here}; pass what that run had, made by the same call"
            )


def _random_state() -> dict[str, Any]:
    """The state of every global random number generator."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (kind, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    for device, saved in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(saved, device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
