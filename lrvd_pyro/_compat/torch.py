"""Private parts of torch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "evaluated_node",
    "forward_hooks",
    "in_backward",
    "is_compiled",
    "next_node",
    "persistent_buffers",
    "tree_leaves",
    "tree_map",
]


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread.

    Private, since torch has no public name for it.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def next_node() -> int:
    """The number that the next autograd node of this thread will have.

    Private, since torch shows the number only of nodes that exist.
    """
    return int(torch._C._autograd._get_sequence_nr())


def evaluated_node() -> int:
    """The number of the node that the backward pass evaluates now; -1 without one.

    Private, since torch has no public name for it.
    """
    node: Any = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())


def is_compiled(net: nn.Module) -> bool:
    """Whether ``compile()`` was called on a network or a part of it.

    Private, since ``compile`` leaves no public mark on the module.
    """
    return any(module._compiled_call_impl is not None for module in net.modules())


def forward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The forward pre-hooks and forward hooks of a module by key, to read or delete.

    Private, since only a handle removes a hook, and a copied module has no handles.
    """
    return module._forward_pre_hooks, module._forward_hooks


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module itself, without submodules, that its state dict holds.

    Private, since ``named_buffers`` yields the non-persistent buffers as well.
    """
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer
