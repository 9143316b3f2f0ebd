"""The draw that is bound at present, from which the hooks read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from lrvd_pyro._compat.torch import in_backward

__all__ = ["Bank", "Contexts", "Kind", "Parts"]

Kind = Literal["gate", "lora_A", "lora_B"]
Parts = dict[Kind, Sequence[Tensor]]  # for each kind of draw, one tensor per module
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

_RECOMPUTED = (
    "activation checkpointing recomputes a LoRA layer whose draw was released; use "
    "the network's own gradient_checkpointing_enable(), or give "
    "torch.utils.checkpoint.checkpoint context_fn=space.checkpoint_context"
)


class Bank:
    """Holds the bound draw: for each kind of draw, one tensor per LoRA module."""

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.drawn = False  # whether the last forward pass used a draw
        self.replaying = False  # whether a `_Replay` recomputes a forward pass now

    @contextmanager
    def holding(self, parts: Parts) -> Iterator[None]:
        """Bind ``parts`` for the duration of the block."""
        before, self.parts = self.parts, parts
        try:
            yield
        finally:
            self.parts = before

    def read(self, kind: Kind, index: int) -> Tensor | None:
        """The tensor that module ``index`` uses now; None if no draw is bound.

        Raises:
            RuntimeError: In a backward pass that recomputes a forward pass whose draw
                no `checkpoint_context` has kept.
        """
        # A layer that runs inside the backward pass is being recomputed. By then the
        # draw of its forward pass is gone, or another one is bound: reading that one
        # would give a wrong gradient in silence. Dynamo cannot trace `in_backward`.
        if not torch.compiler.is_compiling() and in_backward() and not self.replaying:
            if self.drawn:
                raise RuntimeError(_RECOMPUTED)
            return None
        self.drawn = self.parts is not None
        return self.parts[kind][index] if self.parts and kind in self.parts else None

    def checkpoint_context(
        self, inner: Callable[[], Contexts] = noop_context_fn
    ) -> Contexts:
        """The ``context_fn`` under which a recomputation sees the draw bound now.

        Args:
            inner: Another ``context_fn``, to be entered within this one.

        Returns:
            The contexts of the forward pass and of its recomputation.
        """
        forward, recompute = inner()
        return forward, _Replay(self, self.parts, recompute)


class _Replay:
    """Binds the draw of a checkpointed forward pass while that pass is recomputed.

    A class instead of a generator, because it is entered several times: every backward
    pass through a retained graph recomputes the forward pass.
    """

    def __init__(
        self, bank: Bank, parts: Parts | None, inner: AbstractContextManager[Any]
    ) -> None:
        self.bank, self.parts, self.inner = bank, parts, inner

    def __enter__(self) -> None:
        self.inner.__enter__()
        self.before = self.bank.parts, self.bank.replaying
        self.bank.parts, self.bank.replaying = self.parts, True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        self.bank.parts, self.bank.replaying = self.before
        return self.inner.__exit__(kind, error, trace)
