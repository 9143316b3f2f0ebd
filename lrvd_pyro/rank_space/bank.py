"""What is bound at present, for the hooks to read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from lrvd_pyro._compat.torch import in_backward

Kind = Literal["gate", "lora_A", "lora_B"]
Parts = dict[Kind, Sequence[Tensor]]
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

RECOMPUTED = (
    "an activation checkpoint recomputes a LoRA layer after its draw was released; use "
    "the network's own gradient_checkpointing_enable(), or give "
    "torch.utils.checkpoint.checkpoint context_fn=space.checkpoint_context"
)


class Bank:
    """What is bound at present: for each kind of draw, one tensor per LoRA module."""

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.drawn = False  # whether the last forward pass used a draw
        self.replaying = False  # whether a checkpoint of ours recomputes

    @contextmanager
    def holding(self, parts: Parts) -> Iterator[None]:
        """Bind ``parts`` for the duration of the block."""
        before, self.parts = self.parts, parts
        try:
            yield
        finally:
            self.parts = before

    def read(self, kind: Kind, index: int) -> Tensor | None:
        """The tensor that module ``index`` is to use now; None if nothing is bound.

        Raises:
            RuntimeError: In a backward pass that recomputes a forward pass whose draw
                no `checkpoint_context` has kept.
        """
        if not torch.compiler.is_compiling() and in_backward() and not self.replaying:
            if self.drawn:
                raise RuntimeError(RECOMPUTED)
            return None
        self.drawn = self.parts is not None
        return self.parts[kind][index] if self.parts and kind in self.parts else None

    def checkpoint_context(
        self, inner: Callable[[], Contexts] = noop_context_fn
    ) -> Contexts:
        """A checkpoint's ``context_fn``: the recomputation sees the draw bound now."""
        forward, recompute = inner()
        return forward, Replay(self, self.parts, recompute)


class Replay:
    """Binds what a checkpointed forward pass used while that pass is recomputed.

    It can be entered again: a retained graph is recomputed by every backward pass.
    """

    def __init__(
        self, bank: Bank, parts: Parts | None, inner: AbstractContextManager[Any]
    ) -> None:
        self.bank, self.parts, self.inner = bank, parts, inner

    def __enter__(self) -> None:
        self.inner.__enter__()
        self.before = self.bank.parts, self.bank.replaying
        self.bank.parts, self.bank.replaying = self.parts, True

    def __exit__(self, *error: Any) -> bool | None:
        self.bank.parts, self.bank.replaying = self.before
        return self.inner.__exit__(*error)
