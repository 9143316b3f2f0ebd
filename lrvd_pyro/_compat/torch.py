"""Private parts of torch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "forward_hooks",
    "in_backward",
    "is_compiled",
    "persistent_buffers",
    "tree_leaves",
    "tree_map",
]


def in_backward() -> bool:
    """Whether the autograd engine is running in this thread.

    Private, since torch says so nowhere else.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def is_compiled(net: nn.Module) -> bool:
    """Whether ``net.compile()`` was called on a network or a part of it.

    Private, since ``compile`` leaves no public mark.
    """
    return any(module._compiled_call_impl is not None for module in net.modules())


def forward_hooks(module: nn.Module) -> tuple[dict[int, Any], dict[int, Any]]:
    """The pre-hooks and hooks of a module by their keys, to look at or delete.

    Private, since a handle removes its own hook alone and copies have no handles.
    """
    return module._forward_pre_hooks, module._forward_hooks


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of a module itself that its state dict holds.

    Private, since ``named_buffers`` does not tell them from the others.
    """
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            yield name, buffer
