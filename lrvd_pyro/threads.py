"""One thread at a time, for what torch and Pyro keep once for the whole process."""

import asyncio
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_at_a_time"]


class _Here(threading.local):
    """What is this thread's own."""

    def __init__(self) -> None:
        self.token = object()  # a thread's number is given again after its end


class _Turn:
    """A reentrant lock that another thread may give back.

    A generator that binds a draw may be closed by another thread than the one that
    entered it; Python's own RLock would then stay taken for ever.
    """

    def __init__(self) -> None:
        self.here, self.lock = _Here(), threading.Lock()
        self.owner: object = None
        self.task: object = None
        self.depth = 0

    def take(self) -> None:
        task = _task()
        if self.owner is not self.here.token:
            self.lock.acquire()
            self.owner, self.task = self.here.token, task
        elif self.task is not task:
            raise RuntimeError(
                "another asyncio task of this thread is within a block that binds a "
                "draw; leave the block before an await, or call predict by "
                "asyncio.to_thread"
            )
        self.depth += 1

    def give(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            self.owner = self.task = None
            self.lock.release()


def _task() -> object:
    """The asyncio task that runs at present, if any."""
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


_turn = _Turn()


def _renew() -> None:
    # A forked child has the lock as it stood, and not the thread that would give it.
    global _turn
    _turn = _Turn()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Keep other threads out of every such block of the process; they wait.

    One lock serves all models. The random state, Pyro's handlers, and the mode of a
    network that two models share belong to the process, so a lock for each model would
    not protect them; and two locks could wait for each other.

    Raises:
        RuntimeError: In an asyncio task, if another task of its thread is within such a
            block. To wait for it would stop both.
    """
    _turn.take()
    try:
        yield
    finally:
        _turn.give()
