"""Whether saved groups and moments are such that an optimizer can go on with them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro.optim import AdamW, Optimizer
from lrvd_pyro.storage.schema import Check, Misfit, flag, like, number, optional
from lrvd_pyro.training.tensors import Layout

__all__ = ["check_moments"]

_RATES = ("lr", "weight_decay", "eps", "betas", "momentum", "dampening", "alpha", "rho")
_NEEDED = {"lr", "betas", "eps", "momentum", "weight_decay"}


def check_moments(
    path: Path, optimizer: Optimizer, layout: Layout, saved: Mapping[str, Any]
) -> None:
    """Raise unless a step could be taken with the saved groups and moments.

    A moment of another shape than its parameter would make torch's fused steps write
    beyond it. Of optimizers that are not torch's own, finite numbers alone are asked.

    Args:
        path: The checkpoint, for the message.
        optimizer: The optimizer that is to take them.
        layout: The layout of the tensors of model and guide, by name.
        saved: The state from `optimizer_state`.

    Raises:
        ValueError: With what does not fit.
    """
    try:
        _check(optimizer, layout, saved)
    except Misfit as error:
        raise ValueError(f"{path}: in the optimizer's state, {error}") from None


def _check(optimizer: Any, layout: Layout, saved: Mapping[str, Any]) -> None:
    """Check names, then each group, then the moments of its parameters."""
    own = isinstance(optimizer, AdamW)
    optim = optimizer.torch_optim if own else optimizer
    live = optimizer.groups if optim is None else optim.param_groups
    like(getattr(optimizer, "steps", None))(saved["steps"], "steps")
    if len(saved["groups"]) not in ({0, len(live)} if own else {len(live)}):
        raise Misfit("groups", saved["groups"], f"{len(live)} groups")
    names = [name for group in saved["groups"] for name in group["params"]]
    if strange := {*names} - layout.keys():
        raise Misfit("params", sorted(strange), "names of what the model has")
    if len(names) > len({*names}):
        raise Misfit("params", names, "each parameter once")
    if saved["moments"].keys() != {*names}:
        expected = "an entry for each parameter in the groups"
        raise Misfit("moments", sorted(saved["moments"]), expected)
    cls = torch.optim.AdamW if own else type(optimizer)
    usual = torch.optim.AdamW([torch.zeros(1)]).param_groups[0] if own else {}
    same = saved["torch"] == str(torch.__version__)
    for i, (group, present) in enumerate(zip(saved["groups"], live)):
        _check_group(group, {**usual, **present}, f"groups[{i}]", exact=same)
        shapes = {name: layout[name][1] for name in group["params"]}
        # One step for all parameters of as many dimensions.
        trials = {n: _trial(cls, group, n) for n in {*map(len, shapes.values())}}
        for name, shape in shapes.items():
            state, trial = saved["moments"][name], trials[len(shape)]
            _check_state(state, shape, trial, f"moments[{name!r}]")


def _check_group(
    group: dict[str, Any], live: dict[str, Any], place: str, *, exact: bool
) -> None:
    """Accept entries of the kinds that the live ones have.

    Another version of torch may have more or fewer, and fills in what is missing.
    """
    unlike = (group.keys() ^ live.keys()) - {"initial_lr"}  # which schedules add
    unlike = unlike if exact else (_NEEDED & live.keys()) - group.keys()
    if unlike:
        raise Misfit(place, sorted(group), f"other entries in {sorted(unlike)}")
    for name in group.keys() - {"params"}:
        where, value = f"{place}[{name!r}]", group[name]
        check: Check = like(live.get(name))
        if name in ("foreach", "fused"):
            check = optional(flag)
        check(value, where)
        if name in _RATES:
            _check_rate(value, 1.0 if name == "betas" else float("inf"), where)


def _check_rate(value: Any, end: float, place: str) -> None:
    for rate in value if isinstance(value, list | tuple) else [value]:
        if rate is not None:
            number(rate.item() if isinstance(rate, Tensor) else rate, place)
            if not 0 <= rate < end:
                raise Misfit(place, rate, "a rate in its range")


def _check_state(
    state: Mapping[str, Any], shape: tuple[int, ...], trial: Any, place: str
) -> None:
    """Accept no moments, as before the first gradient, or those of a trial's shapes."""
    if state and trial is not None and state.keys() != trial.keys():
        raise Misfit(place, sorted(state), f"{sorted(trial)}")
    for name, value in state.items():
        where, usual = f"{place}[{name!r}]", trial and trial[name]
        if isinstance(usual, Tensor) != isinstance(value, Tensor) and trial is not None:
            raise Misfit(where, value, "a tensor" if usual is not None else "no tensor")
        if not isinstance(value, Tensor):
            continue
        if isinstance(usual, Tensor):
            _check_moment(value, shape, usual, where)
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise Misfit(where, value, "finite numbers: a gradient was too large")


def _check_moment(
    value: Tensor, shape: tuple[int, ...], usual: Tensor, place: str
) -> None:
    """Compare with the moment of a small parameter, of twos in each dimension."""
    whole = usual.shape == (2,) * len(shape)
    # Moments have any precision of floating point, counts their own.
    kinds = value.is_floating_point() == usual.is_floating_point()
    if not kinds or (usual.dim() == 0 and value.dtype != usual.dtype):
        raise Misfit(place, value, f"a tensor like {usual.dtype}")
    if tuple(value.shape) != tuple(shape) if whole else value.dim() != usual.dim():
        expected = f"the shape {list(shape)}" if whole else f"{usual.dim()} dimensions"
        raise Misfit(place, value, expected)
    counts = place.endswith(("sq']", "step']", "sum']"))
    if counts and bool((value < 0).any()):
        raise Misfit(place, "negative somewhere", "numbers from 0 on")


def _trial(cls: type, group: dict[str, Any], dims: int) -> Any:
    """The moments of a small parameter after a step in a group like this one.

    None for a class that is not torch's, or whose step takes more than gradients.
    """
    if not cls.__module__.startswith("torch.optim"):
        return None
    weight = torch.zeros((2,) * dims, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    taken = group.keys() & inspect.signature(cls).parameters.keys() - {"params"}
    maker: Any = cls
    try:
        optim = maker([weight], **{name: group[name] for name in taken})
        optim.step()
    except Exception:  # whatever a closure that is missing leads to
        return None
    return dict(optim.state[weight])
