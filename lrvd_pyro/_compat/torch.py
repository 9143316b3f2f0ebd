"""Private parts of torch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "add_each",
    "compiled_original",
    "convolves",
    "evaluated_node",
    "forward_hooks",
    "in_backward",
    "is_compiled",
    "multiply_each",
    "next_node",
    "persistent_buffers",
    "tree_leaves",
    "tree_map",
]


def convolves(module: nn.Module) -> bool:
    """Whether a module computes what ``F.conv1d``, 2d or 3d does with its attributes.

    Private, since a subclass may override ``_conv_forward`` in place of ``forward``.
    """
    own: Any = type(module)
    return any(
        isinstance(module, kind)
        and module.padding_mode == "zeros"
        and own.forward is kind.forward
        and own._conv_forward is kind._conv_forward
        for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    )


def add_each(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Add to each tensor, in place, its partner: one fused operation.

    Private, since torch has no public name for operations on lists of tensors.
    """
    torch._foreach_add_(tensors, others)


def multiply_each(tensors: list[Tensor], factor: float) -> None:
    """Multiply each tensor, in place: one fused operation.

    Private, since torch has no public name for operations on lists of tensors.
    """
    torch._foreach_mul_(tensors, factor)


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


def compiled_original(net: object) -> object:
    """The network within one that ``torch.compile`` returned; None of any other.

    Private, since a compiled module shows its original under no public name.
    """
    return getattr(net, "_orig_mod", None)


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
