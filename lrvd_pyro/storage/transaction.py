"""A block after whose failure objects are bit for bit what they were before it."""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrvd_pyro.storage.random_state import random_state, set_random_state

__all__ = ["told_of", "unchanged_on_error"]

# Objects of these packages may be changed by what runs in the block.
_PACKAGES = ("lrvd_pyro.", "torch.optim", "pyro.params", "peft.")
_PLAIN = (int, float, complex, str, bytes, type(None), type)


@contextmanager
def unchanged_on_error(
    *things: object, values: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Give objects back their parts, and the generators their state, on an error.

    What counts as a part: attributes, modules, entries of dicts, lists and sets, which
    memory a tensor has, its gradient, and whether it trains. Only of ``values`` are
    numbers kept.

    Wrong for other tensors whose numbers the block overwrites in place.

    Args:
        things: Networks, guides, optimizers, schedules.
        values: Tensors that the block overwrites in place.
    """
    before = _Snapshot(things)
    copies = [(tensor, tensor.detach().clone()) for tensor in values]
    generators = random_state()
    try:
        yield
    except BaseException:
        before.restore()
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)
        set_random_state(generators)
        raise


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Add the path that was being read or written to errors that do not name it."""
    try:
        yield
    except Exception as error:
        if str(path) not in str(error):
            error.add_note(f"while reading or writing {path}")
        raise


class _Snapshot:
    """The parts of objects, and of their parts, by identity.

    Args:
        things: The objects; others are looked into if they may change.
    """

    def __init__(self, things: Iterable[object]) -> None:
        # The objects are kept: the identity of a dead one may be given again.
        self.seen: dict[int, object] = {}
        self.parts: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
        given = [*things]
        # No recursion, for deep networks.
        left: list[object] = [vars(t) for t in given if hasattr(t, "__dict__")] + given
        while left:
            thing = left.pop()
            if not isinstance(thing, _PLAIN) and id(thing) not in self.seen:
                self.seen[id(thing)] = thing
                left += self._parts_of(thing)

    def _parts_of(self, thing: Any) -> list[object]:
        if isinstance(thing, Tensor):
            if thing.is_leaf:
                state = thing, thing.data, thing.grad, thing.requires_grad
                self.tensors.append(state)
            return []
        if isinstance(thing, dict):
            self.parts.append((thing, [*thing.items()]))
            return [part for item in thing.items() for part in item]
        if isinstance(thing, list | set | deque):
            self.parts.append((thing, [*thing]))
        elif _may_change(thing):
            return [vars(thing)]
        return [*thing] if isinstance(thing, list | set | deque | tuple) else []

    def restore(self) -> None:
        """Make everything what it was."""
        for container, before in self.parts:
            # One that takes no changes has none, and must not keep the others back.
            with suppress(Exception):
                _refill(container, before)
        for tensor, data, gradient, trains in self.tensors:
            tensor.data = data
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains)
            tensor.grad = gradient


def _refill(container: Any, before: list[Any]) -> None:
    """Give a container its content back, by the methods of its plain class."""
    if isinstance(container, dict):
        now = [id(part) for item in container.items() for part in item]
        if now == [id(part) for item in before for part in item]:
            return
        plain: Any = OrderedDict if isinstance(container, OrderedDict) else dict
        plain.clear(container)
        for key, value in before:
            plain.__setitem__(container, key, value)
    elif isinstance(container, set):
        container.clear()
        container.update(before)
    elif [*map(id, container)] != [*map(id, before)]:
        container.clear()
        container.extend(before)


def _may_change(thing: object) -> bool:
    if not hasattr(thing, "__dict__"):
        return False
    known = isinstance(thing, nn.Module | torch.optim.Optimizer)
    return known or type(thing).__module__.startswith(_PACKAGES)
