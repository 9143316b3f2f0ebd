"""Two versions of a run, written in turn to one path, and what is found there."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import fault_runs as runs
from benchmarks.fault_trials import shown
from peft import PeftModel
from safetensors.torch import load_file

import lrvd_pyro as lrvd

NAME = "gates"
Verdict = tuple[str, str]
SAME: Verdict = ("same", "")


class Write(NamedTuple):
    """How a function writes a run, and how what it wrote is read."""

    write: Callable[[Path, runs.Run], object]
    read: Callable[[Path], Any]  # a tree that tells the versions apart


def _exported(path: Path, written: runs.Run) -> None:
    """An export, which takes a new folder each time."""
    number = len([*path.parent.glob(f"{path.name}*")])
    target = path.with_name(f"{path.name}{number}" if path.exists() else path.name)
    lrvd.export_peft(target, written["model"], written["guide"])


def _export_read(path: Path) -> Any:
    PeftModel.from_pretrained(runs.base(NAME), path)
    return load_file(path / "adapter_model.safetensors")


def _resumed(path: Path) -> Any:
    lrvd.resume(path, **(target := other_run()))
    return {k: v for k, v in runs.state_of(target).items() if k != "random"}


@cache
def other_run() -> runs.Run:
    """The run into which checkpoints are read."""
    return runs.trained(NAME, 3, 1)


WRITES = {
    "save": Write(
        lambda path, each: lrvd.save(path, each["model"], each["guide"]),
        lambda path: runs.pair_state(*lrvd.load(path, runs.base(NAME))),
    ),
    "checkpoint": Write(lambda path, each: lrvd.checkpoint(path, **each), _resumed),
    "export": Write(_exported, _export_read),
}


@cache
def versions(function: str, folder: Path) -> tuple[dict[str, str], ...]:
    """What is read of the two versions when nothing goes wrong."""
    found = []
    for number in (1, 2):
        path = folder / f"{function}{number}"
        WRITES[function].write(path, runs.reference(NAME, number))
        found.append(runs.bits(WRITES[function].read(path)))
    assert found[0] != found[1]
    return tuple(found)


class Scene(NamedTuple):
    """A function, the path that it writes, and what it may find there."""

    function: str
    path: Path
    known: tuple[dict[str, str], ...]

    def write(self, number: int) -> None:
        """Write a version."""
        WRITES[self.function].write(self.path, runs.reference(NAME, number))

    def turns(self, first: int, count: int) -> None:
        """Write the versions in turn."""
        for each in range(count):
            self.write(1 + (first + each) % 2)

    def verdict(self, expected: int | None = None) -> Verdict:
        """Whether a whole version is there, or this one."""
        visible = [p for p in self.path.parent.iterdir() if p.name[0] != "."]
        if not visible and self.function != "export":
            return "silently wrong", "nothing is left"
        for path in visible:
            try:
                found = runs.bits(WRITES[self.function].read(path))
            except Exception as error:
                return "silently wrong", f"lost: {shown(error)}"
            allowed = self.known if expected is None else [self.known[expected - 1]]
            if found not in allowed:
                return "silently wrong", "neither of the versions"
        return SAME

    def left_behind(self) -> Verdict:
        """Whether temporary files are left."""
        hidden = [p.name for p in self.path.parent.iterdir() if p.name[0] == "."]
        return ("state changed", f"left behind: {hidden}") if hidden else SAME
