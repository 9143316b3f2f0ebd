"""Whether saved groups and moments are such that an optimizer can go on with them."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrvd_pyro.optim import AdamW, Optimizer
from lrvd_pyro.storage.schema import Misfit, flag, like, number, optional, short
from lrvd_pyro.training.tensors import Layout

__all__ = ["check_moments"]

_RATES = ("lr", "weight_decay", "eps", "betas", "momentum", "dampening", "alpha", "rho")


def check_moments(
    path: Path, optimizer: Optimizer, layout: Layout, saved: Mapping[str, Any]
) -> None:
    """Raise unless a step could be taken with the saved groups and moments.

    A moment of another shape than its parameter would make torch's fused steps write
    beyond it.

    Args:
        path: The checkpoint, for the message.
        optimizer: The optimizer that is to take them.
        layout: The layout of the tensors that it trains, by name.
        saved: The state from `optimizer_state`.

    Raises:
        ValueError: With what does not fit.
    """
    groups, moments = _usual(optimizer)
    try:
        like(getattr(optimizer, "steps", None))(saved["steps"], "steps")
        if groups is not None and len(saved["groups"]) not in (0, len(groups)):
            raise Misfit("groups", saved["groups"], f"{len(groups)} groups")
        for i, group in enumerate(saved["groups"]):
            _check_group(group, groups and groups[i], f"groups[{i}]")
        names = [name for group in saved["groups"] for name in group["params"]]
        trained = [name for name in layout if layout[name][2]]
        if strange := {*names} - {*trained}:
            raise Misfit("params", sorted(strange), "names of what trains")
        if len(names) > len({*names}):
            raise Misfit("params", names, "each parameter once")
        if saved["moments"].keys() != {*names}:
            expected = "an entry for each parameter in the groups"
            raise Misfit("moments", sorted(saved["moments"]), expected)
        for name, state in saved["moments"].items():
            _check_state(state, layout[name][1], moments, f"moments[{name!r}]")
    except Misfit as error:
        raise ValueError(
            f"{path}: the optimizer's {error}; resume an earlier checkpoint"
        ) from None


def _check_group(group: dict[str, Any], usual: Any, place: str) -> None:
    rest = {name: value for name, value in group.items() if name != "params"}
    if usual is not None:
        like({n: v for n, v in usual.items() if n != "params"})(rest, place)
    for name in rest.keys() & {"foreach", "fused"}:
        optional(flag)(rest[name], f"{place}[{name!r}]")
    for name in rest.keys() & {*_RATES}:
        rates = rest[name] if isinstance(rest[name], list | tuple) else [rest[name]]
        for rate in rates:
            number(rate.item() if isinstance(rate, Tensor) else rate, place)
            if not 0 <= rate < (1 if name == "betas" else float("inf")):
                raise Misfit(f"{place}[{name!r}]", rate, "a rate in its range")


def _check_state(
    state: Mapping[str, Any], shape: tuple[int, ...], usual: Any, place: str
) -> None:
    """Accept no moments, as before the first gradient, or all of the usual ones."""
    if state and usual is not None and state.keys() != usual.keys():
        raise Misfit(place, sorted(state), f"{sorted(usual)}")
    for name, value in state.items():
        where, shapes = f"{place}[{name!r}]", [(), tuple(shape)]
        if usual is not None and isinstance(usual[name], Tensor):
            shapes = [tuple(shape) if usual[name].dim() else ()]
        if not isinstance(value, Tensor):
            like(value if value is None else 0.0)(value, where)
        elif not value.is_floating_point() or tuple(value.shape) not in shapes:
            raise Misfit(where, value, f"floating point of shape {shapes}")
        elif not bool(torch.isfinite(value).all()):
            raise Misfit(where, short(value), "finite numbers")


def _usual(optimizer: Any) -> tuple[Any, Any]:
    """The groups that an optimizer has, and the moments of a number.

    None where they cannot be told: a class of one's own may take other arguments, or a
    closure in its step.
    """
    own = isinstance(optimizer, AdamW)
    live = optimizer.torch_optim if own else optimizer
    weight = torch.zeros(1, requires_grad=True)
    weight.grad = torch.zeros(1)
    cls: Any = torch.optim.AdamW if own else type(optimizer)
    defaults = {} if live is None else live.defaults
    taken = defaults.keys() & inspect.signature(cls).parameters.keys()
    try:
        trial = cls([weight], **{name: defaults[name] for name in taken})
        trial.step()
    except (TypeError, ValueError, RuntimeError):
        return (None if live is None else live.param_groups), None
    if live is not None:
        groups = live.param_groups
    else:
        groups = [{**trial.param_groups[0], **group} for group in optimizer.groups]
    return groups, trial.state[weight]
