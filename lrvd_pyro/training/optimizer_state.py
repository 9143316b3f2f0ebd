"""The state of an optimizer by the names of its parameters, whatever their order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro.optim import AdamW, Optimizer
from lrvd_pyro.storage.schema import some

__all__ = ["check_optimizer", "load_optimizer", "optimizer_state"]

_State = dict[str, Any]


def optimizer_state(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> _State:
    """Give the groups and moments of an optimizer by parameter name, uncopied.

    Args:
        optimizer: An optimizer of this library or of torch.
        tensors: The tensors of model and guide by name; the optimizer trains some.

    Raises:
        TypeError: If the optimizer is neither this library's nor torch's.
        ValueError: If it holds other parameters, or a restored state that no step has
            used yet.
    """
    optim = _torch_optimizer(optimizer)
    # Until its next step, a restored AdamW knows its state by order and not by tensor.
    if getattr(optimizer, "pending", None) is not None:
        raise ValueError(
            "the optimizer was restored by set_state and has taken no step since, so "
            "its moments belong to no parameter yet; take one step first"
        )
    names = {tensor: name for name, tensor in tensors.items()}
    groups = [] if optim is None else optim.param_groups
    held = [p for group in groups for p in group["params"]]
    if foreign := [str(tuple(p.shape)) for p in held if p not in names]:
        raise ValueError(
            f"the optimizer holds parameters of shapes {some(foreign)} that neither "
            f"model nor guide has; pass the one that trains them"
        )
    return {
        "steps": getattr(optimizer, "steps", None),
        "torch": str(torch.__version__),
        "groups": [
            {**group, "params": [names[p] for p in group["params"]]} for group in groups
        ],
        # Empty before a parameter's first gradient.
        "moments": {names[p]: optim.state.get(p, {}) for p in held}
        if optim is not None
        else {},
    }


def check_optimizer(
    path: Path,
    optimizer: Optimizer,
    present: Mapping[str, Tensor],
    staying: Mapping[str, Tensor],
    saved: _State,
) -> None:
    """Raise unless `load_optimizer` can restore the saved state.

    Args:
        path: The checkpoint's path, for the message.
        optimizer: The optimizer that is to be restored.
        present: The tensors of model and guide by name.
        staying: Those that the optimizer still trains when ranks are removed.
        saved: The state from `optimizer_state`.

    Raises:
        TypeError: If the optimizer is neither this library's nor torch's.
        ValueError: If its groups hold other parameters than the saved ones.
    """
    optim = _torch_optimizer(optimizer)
    if optim is None or isinstance(optimizer, AdamW):
        return  # this library's AdamW takes any groups: see `load_optimizer`
    names = {tensor: name for name, tensor in present.items()}
    left = [[names.get(p, "another") for p in g["params"]] for g in optim.param_groups]
    groups = [{n for n in g if n in staying or n not in present} for g in left]
    expected = [set(group["params"]) for group in saved["groups"]]
    if groups != expected:
        sizes = [len(g) for g in expected], [len(g) for g in groups]
        raise ValueError(
            f"{path} has an optimizer with groups of {sizes[0]} parameters, this one "
            f"has groups of {sizes[1]}, or of others; make it as for that run: "
            f"torch.optim.AdamW(parameter_groups(model, guide))"
        )


def load_optimizer(
    optimizer: Optimizer, tensors: Mapping[str, Tensor], saved: _State
) -> None:
    """Restore the state from `optimizer_state`.

    Args:
        optimizer: An optimizer that `check_optimizer` has accepted.
        tensors: The tensors of model and guide by name.
        saved: The state.
    """
    if isinstance(optimizer, AdamW):
        # It adds parameters in the order in which steps meet them. Holding the saved
        # ones first restores the order too, and a new optimizer needs no step for it.
        groups = [group["params"] for group in saved["groups"]]
        held = [[tensors[name] for name in names] for names in groups]
        optimizer.hold(held or [[], [], []])
        fused = optimizer.torch_optim
        state = None if fused is None else _torch_state(fused, tensors, saved)
        shapes = [[list(p.shape) for p in params] for params in held]
        optimizer.set_state({"steps": saved["steps"], "optim": state, "shapes": shapes})
    elif (optim := _torch_optimizer(optimizer)) is not None:
        optim.load_state_dict(_torch_state(optim, tensors, saved))


def _torch_state(
    optim: torch.optim.Optimizer, tensors: Mapping[str, Tensor], saved: _State
) -> _State:
    """The saved state as torch has it, numbered by the present order of parameters."""
    names = {tensor: name for name, tensor in tensors.items()}
    order = [names[p] for group in optim.param_groups for p in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    groups = [
        {**group, "params": [number[names[p]] for p in present["params"]]}
        for present, group in zip(optim.param_groups, saved["groups"], strict=True)
    ]
    moments = {number[n]: m for n, m in saved["moments"].items() if m}
    return {"state": moments, "param_groups": groups}


def _torch_optimizer(optimizer: object) -> torch.optim.Optimizer | None:
    """The torch optimizer behind either kind; None before the first step of AdamW."""
    if isinstance(optimizer, AdamW):
        return optimizer.torch_optim
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    raise TypeError(
        f"optimizer is a {type(optimizer).__name__}; checkpoints take "
        f"lrvd_pyro.optim.AdamW, as svi.optim is, or an optimizer of torch"
    )
