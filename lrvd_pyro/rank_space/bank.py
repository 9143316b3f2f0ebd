"""The draw that is bound at present, from which the hooks read."""

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

from lrvd_pyro._compat.torch import evaluated_node, in_backward, next_node
from lrvd_pyro.threads import one_at_a_time

__all__ = ["Bank", "Contexts", "Kind", "Parts"]

Kind = Literal["gate", "lora_A", "lora_B"]
Parts = dict[Kind, Sequence[Tensor]]  # for each kind of draw, one tensor per module
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]

_BLOCKS = 64  # of drawn forward passes whose backward pass may still come

_RECOMPUTED = (
    "activation checkpointing recomputes a LoRA layer whose draw was released; use "
    "the network's own gradient_checkpointing_enable(), or give "
    "torch.utils.checkpoint.checkpoint context_fn=space.checkpoint_context"
)
_ELSEWHERE = (
    "another thread predicts with this network, or has a draw bound to it, and this "
    "thread has none; a draw belongs to the thread that binds it: enter "
    "posterior_sample(...) or space.bind(...) in the thread that runs the network"
)


class _Slot:
    """What a bank holds for one thread."""

    def __init__(self) -> None:
        self.parts: Parts | None = None
        self.owns = False  # whether this thread has the bank to itself
        self.replaying = False  # whether a `_Replay` recomputes a forward pass now


class _Here(threading.local):
    # An object of its own, so that a block that ends in another thread than it began
    # in clears the slot of the thread in which it began.
    def __init__(self) -> None:
        self.slot = _Slot()


class Bank:
    """Holds the bound draw: for each kind of draw, one tensor per LoRA module.

    A draw belongs to the thread that binds it. While a thread has the bank to itself,
    a forward pass in another thread is refused: nothing tells whether it was to run
    without a draw, or is part of the first thread's work, as a streaming ``generate``.
    """

    def __init__(self) -> None:
        self._here = _Here()
        self.owned = False  # whether some thread has the bank to itself
        # For each block with a draw the first autograd node made in it, and the first
        # one after it. All nodes before `_forgotten` may be of such a block.
        self._drawn: deque[list[float]] = deque()
        self._forgotten: float = 0

    def __reduce__(self) -> tuple[type["Bank"], tuple[()]]:
        return Bank, ()  # a copy has no draw; threads cannot be copied

    @property
    def parts(self) -> Parts | None:
        """The draw that is bound in this thread."""
        return self._here.slot.parts

    @contextmanager
    def owning(self) -> Iterator[None]:
        """Have this bank to this thread alone within the block; other threads wait."""
        with one_at_a_time():
            slot = self._here.slot
            before = slot.owns, self.owned
            slot.owns = self.owned = True
            try:
                yield
            finally:
                slot.owns, self.owned = before

    @contextmanager
    def holding(self, parts: Parts) -> Iterator[None]:
        """Bind ``parts`` for the duration of the block, in this thread."""
        with self.owning():
            with self._bound(parts, self._here.slot.replaying):
                yield

    @contextmanager
    def replaying(self, parts: Parts | None) -> Iterator[None]:
        """Bind the draw of a forward pass that this thread recomputes, if it had one.

        This takes no turn: autograd may recompute in a thread of its own, while the
        thread that called it has the turn and waits for it.
        """
        with self._bound(parts, replaying=True):
            yield

    def read(self, kind: Kind, index: int) -> Tensor | None:
        """The tensor that module ``index`` uses now; None if no draw is bound.

        Raises:
            RuntimeError: In a backward pass that recomputes a forward pass whose draw
                no `checkpoint_context` has kept. In a thread without a draw, while
                another thread has the bank to itself.
        """
        slot = self._here.slot
        # A layer that runs inside the backward pass is being recomputed. By then the
        # draw of its forward pass is gone, or another one is bound: reading that one
        # would give a wrong gradient in silence. Dynamo cannot trace `in_backward`.
        if not slot.replaying:
            if not torch.compiler.is_compiling() and in_backward():
                if self._recomputes_a_draw():
                    raise RuntimeError(_RECOMPUTED)
                return None
            if self.owned and not slot.owns:
                raise RuntimeError(_ELSEWHERE)
        parts = slot.parts
        return parts[kind][index] if parts and kind in parts else None

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

    def _recomputes_a_draw(self) -> bool:
        """Whether the node that the backward pass evaluates was made under a draw."""
        # Checkpointing recomputes from a node of the forward pass: its own, or one of
        # the layers in it. Nodes have running numbers.
        node = evaluated_node()
        blocks = list(self._drawn)
        return node < self._forgotten or any(a <= node < b for a, b in blocks)

    @contextmanager
    def _bound(self, parts: Parts | None, replaying: bool) -> Iterator[None]:
        slot = self._here.slot
        with self._noted(slot) if parts else nullcontext():
            before = slot.parts, slot.replaying
            slot.parts, slot.replaying = parts, replaying
            try:
                yield
            finally:
                slot.parts, slot.replaying = before

    @contextmanager
    def _noted(self, slot: _Slot) -> Iterator[None]:
        """Note which autograd nodes are made within the block."""
        if slot.parts is not None:  # a block around this one notes them
            yield
            return
        nodes = [next_node(), math.inf]
        self._drawn.append(nodes)
        try:
            yield
        finally:
            nodes[1] = next_node()
            if nodes[0] == nodes[1]:  # without gradients no node is made
                self._drawn.remove(nodes)
            elif len(self._drawn) > _BLOCKS:
                self._forgotten = self._drawn.popleft()[1]


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
        self.block = self.bank.replaying(self.parts)
        self.block.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        self.block.__exit__(kind, error, trace)
        return self.inner.__exit__(kind, error, trace)
