"""Activation checkpointing that recomputes a layer under its forward pass's draw."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import noop_context_fn

from lrvd_pyro._compat.transformers import (
    checkpointing_function,
    set_checkpointing_function,
)
from lrvd_pyro.rank_space.bank import Bank

__all__ = ["carried_by_checkpointing"]

_REENTRANT = (
    "reentrant activation checkpointing would recompute the network without its draw; "
    "call net.gradient_checkpointing_enable("
    'gradient_checkpointing_kwargs={"use_reentrant": False})'
)


@contextmanager
def carried_by_checkpointing(blocks: Sequence[nn.Module], bank: Bank) -> Iterator[None]:
    """Let Transformers' activation checkpointing carry the draw that ``bank`` holds.

    Args:
        blocks: The blocks of the network that can recompute their activations.
        bank: Holds the draw.

    Raises:
        RuntimeError: If a block does not checkpoint with ``use_reentrant=False``.
    """
    functions = [(block, checkpointing_function(block)) for block in blocks]
    live = [(block, function) for block, function in functions if function]
    for block, function in live:
        # Transformers sets a partial of torch's checkpoint; its keywords are the
        # options. Reentrant checkpointing takes no context_fn, so it cannot carry a
        # draw, and it is torch's default where the option is absent.
        options = getattr(function, "keywords", {})
        if options.get("use_reentrant") is not False:
            raise RuntimeError(_REENTRANT)
        inner = options.get("context_fn", noop_context_fn)
        context_fn = partial(bank.checkpoint_context, inner)
        set_checkpointing_function(block, partial(function, context_fn=context_fn))
    try:
        yield
    finally:
        for block, function in live:
            set_checkpointing_function(block, function)
