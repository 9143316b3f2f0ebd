"""Pyro programs while the process has several threads."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from pyro.poutine.messenger import Messenger

from lrvd_pyro._compat.pyro import messengers, other_thread_in_pyro
from lrvd_pyro.threads import one_at_a_time

__all__ = ["alone_in_pyro"]

# What runs programs by itself, and what enters handlers or has statements.
_DRIVERS = tuple(f"pyro.infer.{m}" for m in ("svi", "elbo", "mcmc", "predictive"))
_ANY = ("pyro.infer.", "pyro.poutine.")


class _Here(threading.local):
    alone = False  # whether this thread is within `alone_in_pyro`


_here = _Here()


@contextmanager
def alone_in_pyro() -> Iterator[None]:
    """Run Pyro programs within the block, of which other threads' handlers see nothing.

    Pyro keeps its effect handlers in one stack for the whole process: a statement of
    one thread goes through the handlers of all. Threads that predict take turns. Pyro's
    own inference takes none, so it is refused beside the block.

    Raises:
        RuntimeError: If another thread runs Pyro's inference or a handler meanwhile.
    """
    if _here.alone:
        yield
        return
    # A driver entered its handlers before it takes its turn, and keeps them after it.
    _refuse(other_thread_in_pyro(*_DRIVERS))
    with one_at_a_time():
        _refuse(other_thread_in_pyro(*_ANY))
        _here.alone = True
        try:
            with _Base():
                yield
        finally:
            _here.alone = False


class _Base(Messenger):
    """Does nothing to a statement, and sees whether the handlers above it have left."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if messengers()[-1:] == [self]:
            return super().__exit__(kind, error, trace)
        # with an error, Pyro removes this handler and all that stand above it
        super().__exit__(RuntimeError, RuntimeError(), trace)
        raise _refusal(other_thread_in_pyro(*_ANY) or "unknown") from error


def _refuse(name: str | None) -> None:
    if name is not None:
        raise _refusal(name)


def _refusal(name: str) -> RuntimeError:
    return RuntimeError(
        f"thread {name!r} runs Pyro at the same time, and Pyro's effect handlers are "
        f"common to all threads: each would see the other's draws and parameters; "
        f"train in one thread at a time (several models: one process for each), and "
        f"predict by lrvd_pyro.predict when no step runs"
    )
