"""A block after whose failure objects are bit for bit what they were before it."""

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["told_of", "unchanged_on_error"]

# Objects of these packages may be changed by what runs in the block.
_PACKAGES = ("lrvd_pyro", "torch.optim", "pyro", "peft", "transformers")


@contextmanager
def unchanged_on_error(
    *things: object, values: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Give objects back their parts, and the generators their state, on an error.

    What counts as a part: attributes, modules, entries of dicts, lists and sets, which
    memory a tensor has and whether it trains. Only of ``values`` are numbers kept.

    Wrong for other tensors whose numbers the block overwrites in place.

    Args:
        things: Networks, guides, optimizers, schedules.
        values: Tensors that the block overwrites in place.
    """
    before = _Snapshot()
    before.take(things)
    copies = [(tensor, tensor.detach().clone()) for tensor in values]
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    except BaseException:
        before.restore()
        with torch.no_grad():
            for tensor, copy in copies:
                tensor.copy_(copy)
        torch.set_rng_state(generators[0])
        np.random.set_state(generators[1])
        random.setstate(generators[2])
        torch.cuda.set_rng_state_all(cuda)
        raise


@contextmanager
def told_of(path: Path) -> Iterator[None]:
    """Add the path that was being read to errors that do not name it."""
    try:
        yield
    except Exception as error:
        if str(path) not in str(error):
            error.add_note(f"while reading or writing {path}")
        raise


class _Snapshot:
    """The parts of objects, and of their parts, by identity."""

    def __init__(self) -> None:
        # The objects are kept: the identity of a dead one may be given again.
        self.seen: dict[int, object] = {}
        self.parts: list[tuple[Any, Any]] = []
        self.tensors: list[tuple[Tensor, Tensor, bool]] = []

    def take(self, *things: object) -> None:
        """Remember objects and all that they reach; no recursion, for deep networks."""
        left = [*things]
        while left:
            thing = left.pop()
            if id(thing) not in self.seen:
                self.seen[id(thing)] = thing
                left += self._parts_of(thing)

    def _parts_of(self, thing: Any) -> list[object]:
        if isinstance(thing, Tensor):
            if thing.is_leaf:
                self.tensors.append((thing, thing.data, thing.requires_grad))
            return []
        if isinstance(thing, dict | list | set):
            self.parts.append((thing, thing.copy()))
        elif _may_change(thing):
            return [vars(thing)]
        elif not isinstance(thing, tuple | frozenset):
            return []
        return [*thing.items()] if isinstance(thing, dict) else [*thing]

    def restore(self) -> None:
        """Make everything what it was."""
        for container, before in self.parts:
            if isinstance(container, list):
                container[:] = before
            else:
                container.clear()
                container.update(before)
        for tensor, data, trains in self.tensors:
            tensor.data = data
            if tensor.requires_grad != trains:
                tensor.requires_grad_(trains)


def _may_change(thing: object) -> bool:
    if isinstance(thing, type) or not hasattr(thing, "__dict__"):
        return False
    return isinstance(thing, nn.Module | torch.optim.Optimizer) or type(
        thing
    ).__module__.startswith(_PACKAGES)
