"""What the entries of a stored tree must be, checked before anything reads them.

A `Check` raises `Misfit` with the entry's place and what was expected there. Small ones
make large ones: ``record({"ranks": list_of(whole(1)), "name": text})``.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = [
    "Check",
    "Misfit",
    "anything",
    "flag",
    "like",
    "list_of",
    "number",
    "optional",
    "record",
    "short",
    "some",
    "table_of",
    "text",
    "whole",
]

Check = Callable[[Any, str], None]  # a value, and its place for the message


class Misfit(Exception):
    """An entry that is not as expected; the message says where, what and what else."""

    def __init__(self, place: str, value: object, expected: str) -> None:
        super().__init__(f"{place or 'it'} is {short(value)}; expected {expected}")


def short(value: object) -> str:
    """A value for a message: its first 60 characters."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}, {list(value.shape)}"
    # Slices, for repr of a large tree takes long.
    words = repr(value[:60] if isinstance(value, str | list | tuple) else value)
    return words if len(words) <= 60 else f"{words[:60]}..."


def some(items: Iterable[str]) -> str:
    """Join the first three, and say how many more there are."""
    first, rest = (them := [*items])[:3], len(them) - 3
    return "; ".join(first) + (f"; and {rest} more" if rest > 0 else "")


def anything(value: object, place: str) -> None:
    """Accept every value."""


def text(value: object, place: str) -> None:
    """Accept a text."""
    if not isinstance(value, str):
        raise Misfit(place, value, "a text")


def flag(value: object, place: str) -> None:
    """Accept true or false."""
    if not isinstance(value, bool):
        raise Misfit(place, value, "true or false")


def whole(least: int) -> Check:
    """Accept a whole number of ``least`` or more, up to those of 64 bits."""

    def check(value: object, place: str) -> None:
        if type(value) is not int or not least <= value < 2**63:
            raise Misfit(place, value, f"a whole number, {least} or more")

    return check


def number(value: object, place: str) -> None:
    """Accept a finite number; a whole one of 64 bits, as tensors take."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Misfit(place, value, "a number")
    if not (abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)):
        raise Misfit(place, value, "a finite number")


def optional(check: Check) -> Check:
    """Accept nothing (null), or what another check accepts."""
    return lambda value, place: None if value is None else check(value, place)


def list_of(check: Check) -> Check:
    """Accept a list or tuple whose every element passes."""

    def check_all(value: object, place: str) -> None:
        if not isinstance(value, list | tuple):
            raise Misfit(place, value, "a list")
        for i, element in enumerate(value):
            check(element, f"{place}[{i}]")

    return check_all


def table_of(check: Check) -> Check:
    """Accept a dict from texts to values that pass."""

    def check_all(value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise Misfit(place, value, "a dict")
        for name, element in value.items():
            text(name, f"a name in {place}")
            check(element, f"{place}[{name!r}]")

    return check_all


def record(entries: Mapping[str, Check], *, more: bool = False) -> Check:
    """Accept a dict with exactly these entries.

    Args:
        entries: The check of each.
        more: Accept others too.
    """

    def check_all(value: object, place: str) -> None:
        if not isinstance(value, dict):
            raise Misfit(place, value, f"a dict of {sorted(entries)}")
        missing = entries.keys() - value.keys()
        unknown = set() if more else value.keys() - entries.keys()
        if missing or unknown:
            raise Misfit(
                f"the list of names in {place or 'it'}",
                sorted(value, key=str),
                f"{sorted(missing)} too and not {sorted(unknown, key=str)}",
            )
        for name, check in entries.items():
            check(value[name], f"{place}[{name!r}]" if place else name)

    return check_all


def like(live: object, *, fixed: bool = False) -> Check:
    """Accept what has the names and the kinds of a live state.

    A number stands for any number, a list for any number of elements like its first,
    and a tuple for its length of elements like its own. A tensor stands for any of its
    precision and number of dimensions, NaN included, which a history has where a rank
    is gone. Null stands for anything plain.

    Args:
        live: The state.
        fixed: A list too stands for its length.
    """
    if isinstance(live, dict):
        entries = {name: like(value, fixed=fixed) for name, value in live.items()}
        return record(entries)
    if isinstance(live, tuple) or (fixed and isinstance(live, list)):
        return _tuple_like(live)
    if isinstance(live, list):
        return list_of(like(live[0] if live else None))
    if isinstance(live, Tensor):
        return _tensor_like(live)
    if live is None:
        return _plain
    if isinstance(live, bool):
        return flag
    if isinstance(live, int):
        return number
    return _real if isinstance(live, float) else text


def _tuple_like(live: Sequence[object]) -> Check:
    def check(value: object, place: str) -> None:
        if not isinstance(value, list | tuple) or len(value) != len(live):
            raise Misfit(place, value, f"{len(live)} elements")
        for i, element in enumerate(live):
            like(element, fixed=True)(value[i], f"{place}[{i}]")

    return check


def _tensor_like(live: Tensor) -> Check:
    def check(value: object, place: str) -> None:
        if (
            not isinstance(value, Tensor)
            or value.dtype != live.dtype
            or value.dim() != live.dim()
        ):
            raise Misfit(
                place, value, f"a tensor of {live.dtype} with {live.dim()} dimensions"
            )

    return check


def _real(value: object, place: str) -> None:
    """Accept a number, infinity too: the best loss before the first is infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise Misfit(place, value, "a number")


def _plain(value: object, place: str) -> None:
    """Accept numbers, texts, and lists and dicts of them."""
    if isinstance(value, dict):
        for name, element in value.items():
            _plain(element, f"{place}[{name!r}]")
    elif isinstance(value, list | tuple):
        list_of(_plain)(value, place)
    elif value is not None and not isinstance(value, bool | str):
        _real(value, place)
