"""Private parts of Transformers."""

from collections.abc import Callable
from typing import Any

from torch import nn

__all__ = [
    "attention_implementation",
    "checkpoint_function",
    "checkpointing_blocks",
    "set_checkpoint_function",
]

FUNCTION = "_gradient_checkpointing_func"


def checkpointing_blocks(net: nn.Module) -> list[Any]:
    """The blocks of a network that can checkpoint their activations."""
    return [m for m in net.modules() if hasattr(m, "gradient_checkpointing")]


def checkpoint_function(block: Any) -> Callable[..., Any] | None:
    """What a block recomputes its activations by; None where it keeps them now.

    Private, since ``gradient_checkpointing_enable`` takes the function's options alone.
    """
    if not (block.gradient_checkpointing and block.training):
        return None
    found: Callable[..., Any] | None = getattr(block, FUNCTION, None)
    return found


def set_checkpoint_function(block: Any, function: Callable[..., Any]) -> None:
    """Let a block recompute its activations by this function; private as above."""
    setattr(block, FUNCTION, function)


def attention_implementation(net: Any) -> Any:
    """Which attention a network was loaded with.

    Private, since ``from_pretrained`` takes it and no public name gives it back.
    """
    return net.config._attn_implementation
