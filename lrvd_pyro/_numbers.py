"""Numbers that a user gives: refused by name where they mean nothing."""

import math
from collections.abc import Callable
from numbers import Integral, Real

__all__ = ["check_count", "check_number", "check_rate"]


def check_number(
    name: str,
    value: object,
    expected: str,
    allowed: Callable[[float], bool] = math.isfinite,
) -> None:
    """Raise a ValueError unless a value is a number that is allowed. NaN never is.

    Args:
        name: The argument's name, for the message.
        value: What the user gave.
        expected: What would do, in words and by an example.
        allowed: Which numbers will do.
    """
    # True is a Real: lr=True would be a learning rate of one.
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    # NaN fails every comparison, so that `value < low` would let it pass.
    if not is_number or math.isnan(value) or not allowed(value):  # type: ignore[arg-type]
        raise ValueError(f"{name}={value!r}; expected {expected}")


def check_rate(name: str, value: object, example: str) -> None:
    """Raise a ValueError unless a value is a finite number, 0 or more."""
    expected = f"a finite number, 0 or more: {example}"
    check_number(name, value, expected, lambda rate: 0 <= rate < math.inf)


def check_count(name: str, value: object, least: int, example: str) -> None:
    """Raise a ValueError unless a value is a whole number, ``least`` or more."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        raise ValueError(
            f"{name}={value!r}; expected a whole number, {least} or more: {example}"
        )
