"""Stored trees with one entry that is gone, of another kind, or not finite."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

Place = tuple[Any, ...]


def places(tree: Any, limit: int = 3) -> Iterator[Place]:
    """The way to each entry: of a list or a dict of alike things to the first few."""
    for key in keys(tree)[:limit] if len(keys(tree)) > 100 else keys(tree):
        yield (key,)
        for rest in places(tree[key], limit):
            yield (key, *rest)


def keys(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        return [*tree]
    return [*range(min(len(tree), 3))] if isinstance(tree, list | tuple) else []


def variants(value: Any) -> Iterator[Any]:
    """What may stand in an entry's place, none of it right."""
    if isinstance(value, Tensor):
        yield from (value.reshape(-1)[:0], value.long().float().bool(), "tensor")
        if value.is_floating_point():
            yield from (value * math.nan, value.long(), value[None], value.cfloat())
    elif isinstance(value, bool):
        yield from ("yes", None, 7, [])
    elif isinstance(value, int | float):
        yield from ("7", None, [value], {"a": value}, math.nan, math.inf, -(10**30))
    elif isinstance(value, str):
        yield from (7, None, [], f"{value}.x", "(a+)+$", "../../x")
    elif isinstance(value, list | tuple):
        yield from ("list", 7, {"a": 1}, [*value, [[]]], [*value[1:], "x"])
    else:
        yield from ("dict", 7, [])


def damaged(tree: Any) -> Iterator[tuple[str, Any]]:
    """Every copy of a tree with one fault, and where it is."""
    for place in places(tree):
        yield f"without {place}", edited(tree, place, None, gone=True)
        for value in variants(at(tree, place)):
            yield f"{place} = {str(value)[:30]}", edited(tree, place, value)


def at(tree: Any, place: Place) -> Any:
    for key in place:
        tree = tree[key]
    return tree


def edited(tree: Any, place: Place, value: Any, *, gone: bool = False) -> Any:
    """A copy with another value at a place; tensors elsewhere are shared."""
    if not place:
        return value
    key, *rest = place
    new = [*tree] if isinstance(tree, list | tuple) else copy.copy(tree)
    if gone and not rest:
        del new[key]
    else:
        new[key] = edited(tree[key], tuple(rest), value, gone=gone) if rest else value
    return tuple(new) if isinstance(tree, tuple) else new


def state_of(net: torch.nn.Module) -> str:
    """Modules, tensors, what trains, modes and the random state."""
    modules = [(name, type(m).__name__, m.training) for name, m in net.named_modules()]
    trains = [(name, p.requires_grad) for name, p in net.named_parameters()]
    values = {name: t.tolist() for name, t in net.state_dict().items()}
    marks = sorted(name for name in vars(net) if "peft" in name)
    return repr((modules, trains, values, marks, torch.get_rng_state().sum()))
