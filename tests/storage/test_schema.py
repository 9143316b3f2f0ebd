"""Checks of stored trees: each says where an entry is wrong, and what was expected."""

import math
from typing import Any

import pytest
import torch

from lrvd_pyro.storage.schema import (
    Misfit,
    anything,
    flag,
    like,
    list_of,
    number,
    optional,
    record,
    short,
    some,
    table_of,
    text,
    whole,
)

EMPTY = torch.zeros(2, 3, dtype=torch.float64)
LIVE = {"step": 3, "rate": 0.1, "pair": (1, 2.0), "rows": [1], "t": EMPTY}


@pytest.mark.parametrize(
    ("check", "right", "wrong", "message"),
    [
        (text, "a", 1, "x is 1; expected a text"),
        (flag, True, 1, "x is 1; expected true or false"),
        (whole(1), 1, 0, "x is 0; expected a whole number, 1 or more"),
        (whole(1), 2**62, 2**64, "expected a whole number"),
        (whole(0), 0, True, "x is True; expected a whole number"),
        (number, 1, "1", "x is '1'; expected a number"),
        (number, 0.5, math.nan, "x is nan; expected a finite number"),
        (number, 0.5, 10**30, "expected a finite number"),
        (optional(text), None, 1, "expected a text"),
        (list_of(text), ["a"], "a", "x is 'a'; expected a list"),
        (list_of(text), ("a",), ["a", 2], r"x\[1\] is 2; expected a text"),
        (table_of(text), {"a": "b"}, ["a"], r"x is \['a'\]; expected a dict"),
        (table_of(text), {}, {1: "b"}, "a name in x is 1; expected a text"),
        (table_of(text), {}, {"a": 1}, r"x\['a'\] is 1; expected a text"),
        (record({"a": text}), {"a": "b"}, 1, r"x is 1; expected a dict of \['a'\]"),
        (
            record({"a": text}),
            {"a": "b"},
            {"b": "b"},
            r"names in x is \['b'\]; expected \['a'\] too and not \['b'\]",
        ),
        (record({"a": text}, more=True), {"a": "", "b": 1}, {"a": 1}, r"x\['a'\] is 1"),
        (like(3), -0.5, "7", "x is '7'; expected a number"),
        (like(0.1), math.inf, math.nan, "x is nan; expected a number"),
        (like("a"), "b", 1, "expected a text"),
        (like(True), False, 1, "expected true or false"),
        (
            like(None),
            {"a": [1, "b", None]},
            torch.ones(1),
            "a tensor of .*; expec",
        ),
        (like((1, 2)), [3, 4], [3], r"x is \[3\]; expected 2 elements"),
        (like([1, 2]), [3], ["a"], r"x\[0\] is 'a'; expected a number"),
        (like([1, 2], fixed=True), [3, 4], [3], "expected 2 elements"),
        (like([]), [1, "a"], 3, "expected a list"),
        (
            like(EMPTY),
            EMPTY[:1] + 1,
            EMPTY[0, :1],
            r"x is a tensor of torch.float64, \[1\]; expected .* with 2 dimensions",
        ),
    ],
)
def test_a_check_accepts_the_right_and_names_the_wrong(
    check: Any, right: Any, wrong: Any, message: str
) -> None:
    check(right, "x")
    with pytest.raises(Misfit, match=message):
        check(wrong, "x")


def test_a_state_is_like_itself_and_like_a_later_one() -> None:
    check = like(LIVE)
    check(LIVE, "")
    check(LIVE | {"rows": [], "t": EMPTY.repeat(2, 3)}, "")
    with pytest.raises(Misfit, match="pair is 3; expected 2 elements"):
        check(LIVE | {"pair": 3}, "")
    anything(object(), "")


def test_messages_are_short() -> None:
    assert len(short("a" * 10**6)) < 70 and len(short([1] * 10**6)) < 70
    assert short(EMPTY) == "a tensor of torch.float64, [2, 3]"
    assert some("abcde") == "a; b; c; and 2 more" and some("ab") == "a; b"
