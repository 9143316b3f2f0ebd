"""Errors about a batch, without the shapes that Pyro's traces add to them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

__all__ = ["InputError", "plain_errors"]


class _Plain(Exception):
    # Pyro makes an error that it passes on again, of the same class, with the shapes of
    # all sites and parameters below the message.
    def __init__(self, message: str) -> None:
        super().__init__(re.split(r"\n *Trace Shapes:", message)[0])


class InputError(_Plain, ValueError):
    """A ValueError whose message Pyro's traces leave as it is."""


class _PassError(_Plain, RuntimeError):
    """A RuntimeError of a forward pass whose message Pyro's traces leave as it is."""


@contextmanager
def plain_errors() -> Iterator[None]:
    """Keep the shapes of a trace out of the errors that are raised within the block.

    What Pyro itself raises is about its sites, and gets the shapes as ever. So do other
    classes than ValueError and RuntimeError, which stay what they are.
    """
    try:
        yield
    except (ValueError, RuntimeError) as error:
        plain = {ValueError: InputError, RuntimeError: _PassError}.get(type(error))
        if plain is None or _raised_by(error.__traceback__).startswith("pyro."):
            raise
        raise plain(str(error)).with_traceback(error.__traceback__) from error.__cause__


def _raised_by(traceback: TracebackType | None) -> str:
    """The module whose code raised an error."""
    name = ""
    while traceback is not None:
        name = traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
    return name
