"""Activation checkpoints that recompute a layer under the draw of its forward pass."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.utils.checkpoint import noop_context_fn

from lrvd_pyro._compat.transformers import (
    checkpoint_function,
    set_checkpoint_function,
)
from lrvd_pyro.rank_space.bank import Bank

REENTRANT = (
    "reentrant activation checkpointing would recompute the network without its draw; "
    "call net.gradient_checkpointing_enable("
    'gradient_checkpointing_kwargs={"use_reentrant": False})'
)


@contextmanager
def carried_by_checkpoints(blocks: Sequence[Any], bank: Bank) -> Iterator[None]:
    """Let Transformers' gradient checkpointing carry what ``bank`` holds.

    Raises:
        RuntimeError: If a block does not checkpoint with ``use_reentrant=False``.
    """
    functions = [(block, checkpoint_function(block)) for block in blocks]
    live = [(block, function) for block, function in functions if function]
    for block, function in live:
        options = getattr(function, "keywords", {})
        if options.get("use_reentrant") is not False:
            raise RuntimeError(REENTRANT)
        inner = options.get("context_fn", noop_context_fn)
        context_fn = partial(bank.checkpoint_context, inner)
        set_checkpoint_function(block, partial(function, context_fn=context_fn))
    try:
        yield
    finally:
        for block, function in live:
            set_checkpoint_function(block, function)
