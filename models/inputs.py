"""What a network is given: a copy for each forward pass."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lrvd_pyro._compat.torch import tree_leaves, tree_map
from lrvd_pyro.batches import Batch

__all__ = ["Uncopyable", "by_row", "copied", "with_rows"]


class Uncopyable(TypeError):
    """An input of which no pass can have a copy of its own."""


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a network's keyword arguments, which a forward pass may change.

    Passes extend a key-value cache, empty a list, or write to a tensor. With a copy for
    each, all passes see the same inputs, and the caller's objects stay as they were.
    Gradients flow through the copies of tensors. A module is passed as it is.

    Wrong as a way to train an ``nn.Parameter`` within an object of one's own: its copy
    is another parameter.

    Args:
        inputs: The keyword arguments.

    Raises:
        Uncopyable: If one of them cannot be copied.
    """
    # The deepcopy of a parameter would be another parameter, without a graph to it.
    tensors = [t for t in tree_leaves(dict(inputs)) if isinstance(t, Tensor)]
    memo: dict[int, Any] = {id(tensor): tensor.clone() for tensor in tensors}
    with _Cloning():
        return {name: _copy(name, value, memo) for name, value in inputs.items()}


class _Cloning(TorchFunctionMode):
    """Within the block, a deepcopy of a tensor is its clone, with its graph."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.clone())


def _copy(name: str, value: object, memo: dict[int, Any]) -> object:
    if isinstance(value, nn.Module):  # whose parameters may train
        return value
    try:
        return copy.deepcopy(value, memo)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # any class may refuse in any way
        raise Uncopyable(
            f"the batch's {name!r} is a {type(value).__name__}, which cannot be copied "
            f"({error}); a forward pass may change it, so each takes a copy: pass "
            f"tensors, lists or dicts, or give its class a __deepcopy__"
        ) from error


def with_rows(
    batch: Batch, size: int, change: Callable[[Tensor], Tensor]
) -> dict[str, Any]:
    """The batch with ``change`` made to every tensor that has ``size`` rows."""
    changed: dict[str, Any] = tree_map(
        lambda leaf: change(leaf) if by_row(leaf, size) else leaf, dict(batch)
    )
    return changed


def by_row(leaf: object, size: int) -> bool:
    """Whether an entry of a batch is a tensor with a row for each example."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
