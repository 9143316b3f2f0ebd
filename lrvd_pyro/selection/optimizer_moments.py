"""Slicing an optimizer's moments along with the parameters that they belong to.

An optimizer keeps its state by parameter, and pruning keeps every parameter the object
that it is. Only the tensors of the state change, so a scheduler that refers to the
optimizer works on.
"""

from collections.abc import Collection
from functools import cache

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lrvd_pyro._compat.pyro import restored_without_a_step
from lrvd_pyro.optim import Optimizer
from lrvd_pyro.rank_space.removal import Cuts

__all__ = [
    "check_state",
    "optimizers_of",
    "select_state",
    "torch_optimizers",
    "watch_for_stale_state",
]


def torch_optimizers(optimizer: Optimizer) -> list[torch.optim.Optimizer]:
    """The torch optimizers behind one of torch, Pyro or this library, so far as made.

    Raises:
        TypeError: If ``optimizer`` is none of these.
        ValueError: If it holds a restored state that no step has used yet.
    """
    if isinstance(optimizer, torch.optim.Optimizer):
        return [optimizer]
    if not isinstance(optimizer, PyroOptim):
        raise TypeError(
            f"optimizer is a {type(optimizer).__name__}; expected the optimizer itself "
            f"(SVI's is svi.optim, a scheduler's is scheduler.optimizer), or None "
            f"before the first step"
        )
    # A restored state reaches its parameters at the next step alone. Until then there
    # is nothing to slice, and that step would bring back the old shapes.
    if restored_without_a_step(optimizer) or getattr(optimizer, "pending", None):
        raise ValueError(
            "the optimizer was restored and has taken no step since, so that its state "
            "belongs to no parameter yet; take one step before selecting ranks"
        )
    # Pyro makes one optimizer per parameter, within a scheduler if there is one. The
    # `AdamW` of this library holds a single one for all.
    per_parameter = [getattr(o, "optimizer", o) for o in optimizer.optim_objs.values()]
    fused = getattr(optimizer, "torch_optim", None)
    return per_parameter if fused is None else [*per_parameter, fused]


def optimizers_of(
    optimizer: Optimizer, tensors: Collection[Tensor], what: str
) -> list[torch.optim.Optimizer]:
    """`torch_optimizers`, checked to hold some of the ``tensors``, or nothing yet.

    Args:
        optimizer: The optimizer.
        tensors: Some of what it should train.
        what: What they are, for the error message.

    Raises:
        TypeError: As `torch_optimizers` raises it.
        ValueError: If the optimizer holds only other parameters; or as
            `torch_optimizers` raises it.
    """
    optims = torch_optimizers(optimizer)
    known = {p for o in optims for group in o.param_groups for p in group["params"]}
    if known and known.isdisjoint(tensors):
        raise ValueError(
            f"the optimizer holds no {what}; pass the one that trains them"
        )
    return optims


def check_state(optimizer: Optimizer, cuts: Cuts) -> None:
    """Raise unless `select_state` can slice an optimizer's state.

    Raises:
        TypeError: If a part of the state is neither a number nor a tensor of its
            parameter's shape.
        ValueError: If the optimizer holds none of the parameters.
    """
    optims = optimizers_of(optimizer, cuts, "parameter of this model and guide")
    for optim in optims:
        for parameter in cuts.keys() & optim.state.keys():
            for key, value in optim.state[parameter].items():
                shape = getattr(value, "shape", () if _is_number(value) else None)
                if shape not in ((), (1,), parameter.shape):
                    raise TypeError(
                        f"{type(optim).__name__} keeps {key!r} in another shape than "
                        f"the parameter's. It has no rows to remove; use Adam or "
                        f"AdamW, or start a new optimizer after selecting"
                    )


def select_state(optimizer: Optimizer, cuts: Cuts, gone: set[Tensor]) -> None:
    """Slice an optimizer's moments like their parameters, and forget the ``gone`` ones.

    The numbers of steps taken stay.
    """
    for optim in torch_optimizers(optimizer):
        for group in optim.param_groups:
            # In place: a scheduler may hold the same list.
            group["params"][:] = [p for p in group["params"] if p not in gone]
        for parameter in gone & optim.state.keys():
            del optim.state[parameter]
        for parameter in cuts.keys() & optim.state.keys():
            dim, index = cuts[parameter]
            state = optim.state[parameter]
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() == parameter.dim():
                    state[key] = value.index_select(dim, index.to(value.device))
    if isinstance(optimizer, PyroOptim):
        for parameter in gone & optimizer.optim_objs.keys():
            del optimizer.optim_objs[parameter], optimizer.grad_clip[parameter]


@cache
def watch_for_stale_state() -> None:
    """Make a torch step on moments of another shape an error, from now on.

    A fused step would otherwise read the moments of other rows, in silence.
    """
    # One hook for all optimizers, made or to come: the one that was not passed to
    # `select` is unknown. ``cache`` registers it once.
    register_optimizer_step_pre_hook(_refuse_stale_state)


def _refuse_stale_state(optim: torch.optim.Optimizer, *_: object) -> None:
    for parameter, state in optim.state.items():
        for moment in (state.get("exp_avg"), state.get("momentum_buffer")):
            if isinstance(moment, Tensor) and moment.shape != parameter.shape:
                raise RuntimeError(
                    f"a parameter has shape {tuple(parameter.shape)} and its moments "
                    f"have shape {tuple(moment.shape)}: ranks were selected without "
                    f"the optimizer; pass it, prune(model, guide, optimizer)"
                )


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float)
