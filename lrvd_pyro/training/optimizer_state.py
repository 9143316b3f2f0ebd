"""An optimizer's state by the names of its parameters, whatever their order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro.optim import AdamW
from lrvd_pyro.training.tensors import some

State = dict[str, Any]


def optimizer_state(optimizer: Any, tensors: Mapping[str, Tensor]) -> State:
    """Groups and moments of an optimizer over some of the ``tensors``; no copies.

    Raises:
        TypeError: If it is neither this library's nor torch's.
        ValueError: If it holds other parameters, or a restored state not used yet.
    """
    optim = _torch_optimizer(optimizer)
    if getattr(optimizer, "_pending", None) is not None:
        raise ValueError(
            "the optimizer was restored by set_state and has taken no step since, so "
            "that its moments belong to no parameter yet; take one step first"
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
        "groups": [
            {**group, "params": [names[p] for p in group["params"]]} for group in groups
        ],
        "moments": {names[p]: optim.state[p] for p in held if p in optim.state}
        if optim is not None
        else {},
    }


def check_optimizer(
    path: Path,
    optimizer: Any,
    present: Mapping[str, Tensor],
    staying: Mapping[str, Tensor],
    saved: State,
) -> None:
    """Raise unless `load_optimizer` can restore what is saved.

    Raises:
        TypeError: If the optimizer is neither this library's nor torch's.
        ValueError: If its groups hold other parameters than the saved ones.
    """
    optim = _torch_optimizer(optimizer)
    if optim is None or isinstance(optimizer, AdamW):
        return
    names = {tensor: name for name, tensor in present.items()}
    left = [[names.get(p, "another") for p in g["params"]] for g in optim.param_groups]
    found = [{n for n in g if n in staying or n not in present} for g in left]
    expected = [set(group["params"]) for group in saved["groups"]]
    if found != expected:
        sizes = [len(g) for g in expected], [len(g) for g in found]
        raise ValueError(
            f"{path} has an optimizer with groups of {sizes[0]} parameters, this one "
            f"has groups of {sizes[1]}, or of others; make it as for that run: "
            f"torch.optim.AdamW(parameter_groups(model, guide))"
        )


def load_optimizer(optimizer: Any, tensors: Mapping[str, Tensor], saved: State) -> None:
    """Restore `optimizer_state`; ``tensors`` are those of model and guide by name."""
    groups = saved["groups"]
    if isinstance(optimizer, AdamW):
        held = [[tensors[name] for name in group["params"]] for group in groups]
        optimizer.hold(held or [[], [], []])
        shapes = [[list(p.shape) for p in params] for params in held]
        state = _torch_state(optimizer.torch_optim, tensors, saved) if held else None
        optimizer.set_state({"steps": saved["steps"], "optim": state, "shapes": shapes})
    else:
        optimizer.load_state_dict(_torch_state(optimizer, tensors, saved))


def _torch_state(optim: Any, tensors: Mapping[str, Tensor], saved: State) -> State:
    """The saved state as torch has it, by the order of the present parameters."""
    names = {tensor: name for name, tensor in tensors.items()}
    order = [names[p] for group in optim.param_groups for p in group["params"]]
    number = {name: i for i, name in enumerate(order)}
    present = zip(optim.param_groups, saved["groups"], strict=True)
    groups = [
        {**group, "params": [number[names[p]] for p in now["params"]]}
        for now, group in present
    ]
    moments = saved["moments"].items()
    return {"state": {number[n]: m for n, m in moments}, "param_groups": groups}


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer behind either kind, None before its first step."""
    if isinstance(optimizer, AdamW):
        return optimizer.torch_optim
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    raise TypeError(
        f"optimizer is a {type(optimizer).__name__}; checkpoints take "
        f"lrvd_pyro.optim.AdamW, as svi.optim is, or an optimizer of torch"
    )
