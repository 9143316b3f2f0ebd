"""Every entry of the formats once: deleted, of another type, NaN, of another shape.

Of a list, the first two entries and the last stand for all. Every field of PEFT's and
every distribution that a stranger could choose is tried too.
"""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from benchmarks import fault_trees as trees
from benchmarks.fault_mutations import (
    CONFIGS,
    DESCRIPTIONS,
    FIELDS,
    TENSORS,
    read,
    rewrite,
)
from benchmarks.fault_trials import UNWRITABLE, Bench, Outcome
from torch import Tensor

FILES = {"load": (*CONFIGS, TENSORS[0]), "resume": ("",)}


class Change(NamedTuple):
    """Another value at one place of one file; an Ellipsis deletes."""

    kind: str
    file: str
    place: trees.Path
    value: Any
    words: str = ""

    def edit(self, tree: Any, rng: Random) -> tuple[Any, str]:
        """The edited tree, and words."""
        if self.value is ...:
            return trees.drop(tree, self.place), f"without {trees.where(self.place)}"
        told = f"{trees.where(self.place)} as {trees.short(self.value)}"
        return trees.put(tree, self.place, self.value), self.words or told

    def mutate(self, path: Path, other: Path, rng: Random) -> str:
        """Edit the file."""
        return rewrite(path, self.file, self.edit, rng)


def changes(function: str, path: Path) -> Iterator[Change]:
    """All changes of an input."""
    for file in FILES[function]:
        tree = read(path, file)
        for place, value in trees.paths(tree):
            if all(_counts(tree, place[: i + 1]) for i in range(len(place))):
                yield Change("every entry deleted", file, place, ...)
                for kind, new in _others(value).items():
                    yield Change(f"every {kind}", file, place, new)


def strangers(path: Path) -> Iterator[Change]:
    """The fields and distributions of a stranger, for a folder."""
    peft = read(path, CONFIGS[1])
    for chosen in FIELDS:
        yield Change("every PEFT's field", CONFIGS[1], (), peft | chosen, f"{chosen}")
    prior = ("model", "arguments", "weight_prior")
    for described in DESCRIPTIONS:
        yield Change("every distribution", CONFIGS[0], prior, described)


def _counts(tree: Any, place: trees.Path) -> bool:
    parent = trees.at(tree, place[:-1])
    return isinstance(parent, dict) or place[-1] in (0, 1, len(parent) - 1)


def _others(value: Any) -> dict[str, Any]:
    """Values of another kind."""
    if not isinstance(value, Tensor):
        retyped = {"entry retyped": 7 if isinstance(value, str | list | dict) else "x"}
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return retyped | ({"number NaN": math.nan} if is_number else {})
    other = torch.float64 if value.dtype != torch.float64 else torch.float32
    found = {"tensor emptied": value.reshape(-1)[:0], "tensor retyped": value.to(other)}
    if value.is_floating_point():
        found["tensor NaN"] = torch.full_like(value, math.nan)
    return found | {"tensor reshaped": value[None]}


def sweep(
    bench: Bench, function: str, name: str, them: Iterable[Change]
) -> list[Outcome]:
    """A trial of a run's input for every change."""
    found, rng = [], Random(0)
    for each in them:
        try:
            found.append(bench.trial(function, each.kind, name, each.mutate, rng))
        except UNWRITABLE:
            continue
    return found


def swept(bench: Bench, name: str) -> list[Outcome]:
    """All of a run's changes."""
    folder, file = (bench.original(f, name, 1) for f in ("load", "resume"))
    loads = [*changes("load", folder), *strangers(folder)]
    found = sweep(bench, "load", name, loads)
    return found + sweep(bench, "resume", name, changes("resume", file))
