"""One hostile input each, in a process that may die; what came of it, by class.

- same: accepted, and bit for bit as if nothing had happened; or a write that a kill
  or a second process could not spoil
- valid: a stranger's edit that makes another legal model, all of it finite
- refused: an error that names the file and says what is wrong; nothing has changed
- poor error: an error of another type, or without the name of the file
- state changed: an error after which network, guide, optimizer, generators or folder
  are not as they were
- silently wrong: damage that was accepted; or an edit that was accepted and left state
  that is not finite, takes no step, has another base, or other keys, types or shapes
  than a resumed run, or the ranks of a model, can have
- code executed, crashed, hung, memory: what the words say
"""

import itertools
import shutil
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks import fault_runs as runs
from benchmarks.fault_mutations import CHECKPOINT, DAMAGE, FOLDER, STRANGER, Mutation
from benchmarks.fault_processes import Work, run
from torch import nn

import lrvd_pyro as lrvd

CLASSES: tuple[str, ...] = (
    "same",
    "valid",
    "refused",
    "poor error",
    "state changed",
    "silently wrong",
)
CLASSES += ("code executed", "crashed", "hung", "memory")
NAMED = (ValueError, TypeError, RuntimeError)


# An edit that an input has no place for, or that no file holds.
UNWRITABLE = (LookupError, RuntimeError, TypeError, ValueError)


class Outcome(NamedTuple):
    """What came of a trial: its class, and the input and error in words."""

    function: str
    kind: str
    label: str
    told: str


def labeled(error: BaseException, names: set[str]) -> str:
    """The class of an error after which nothing has changed."""
    text = "\n".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "memory"
    own = type(error).__module__.startswith("lrvd_pyro")
    clear = own or type(error) in NAMED or isinstance(error, OSError)
    if not clear or not any(name in text for name in names):
        return "poor error"
    return "refused"


def shown(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Kind(NamedTuple):
    """How a function's input is written, and how a trial of it reads it."""

    write: Callable[[Path, runs.Run], object]
    restore: Callable[[Path, str, int], "Restoring"]
    mutations: dict[str, Mutation]
    suffix: str


class Restoring(NamedTuple):
    """A network, what a failure may not change, the call, and what it restores."""

    net: nn.Module
    state: Callable[[], Any]
    call: Callable[[], runs.Run]
    result: Callable[[runs.Run], Any]


def loading(path: Path, name: str, steps: int) -> Restoring:
    """`load` onto a fresh base."""
    runs.seed(7)
    net = runs.base(name)

    def call() -> runs.Run:
        return runs.loaded_run(*lrvd.load(path, net))

    def state() -> Any:
        return [runs.module_state(net), runs.random_state()]

    def result(run: runs.Run) -> Any:
        return runs.pair_state(run["model"], run["guide"])

    return Restoring(net, state, call, result)


def resuming(path: Path, name: str, steps: int) -> Restoring:
    """`resume` into a run at another moment."""
    run = runs.reference(name, 2, steps)

    def call() -> runs.Run:
        lrvd.resume(path, **run)
        return run

    net = run["model"].base_net
    return Restoring(net, lambda: runs.state_of(run), call, runs.state_of)


def _save(path: Path, run: runs.Run) -> None:
    lrvd.save(path, run["model"], run["guide"])


def _checkpoint(path: Path, run: runs.Run) -> None:
    lrvd.checkpoint(path, **run)


KINDS = {
    "load": Kind(_save, loading, FOLDER, ""),
    "resume": Kind(_checkpoint, resuming, CHECKPOINT, ".safetensors"),
}


class Accepted(NamedTuple):
    """What an accepted input led to, as bits."""

    state: dict[str, str]
    unsound: set[str]
    after: str  # predictions and the next loss, or the error of either


def accepted(name: str, restoring: Restoring, run: runs.Run) -> Accepted:
    """Look at a restored run, and let it predict and take a step."""
    result = restoring.result(run)
    state, unsound = runs.bits(result), runs.not_finite(result)
    try:
        after = runs.bits(runs.predictions(name, run))
        runs.seed(8)
        return Accepted(state, unsound, f"{after} {runs.step(name, run)!r}")
    except Exception as error:
        return Accepted(state, unsound, shown(error))


@cache
def expected(function: str, path: Path, name: str) -> Accepted:
    """What an untouched input leads to."""
    restoring = KINDS[function].restore(path, name, 2)  # no trial takes two steps
    return accepted(name, restoring, restoring.call())


def judged(
    function: str, kind: str, name: str, paths: tuple[Path, Path], steps: int
) -> tuple[str, str]:
    """Restore a hostile input, and give the class of what came of it."""
    path, original = paths
    restoring = KINDS[function].restore(path, name, steps)
    base, before = runs.base_state(restoring.net), runs.bits(restoring.state())
    try:
        run = restoring.call()
    except BaseException as error:
        after = runs.bits(restoring.state())
        if changed := [k for k in before | after if before.get(k) != after.get(k)]:
            return "state changed", f"{shown(error)} | {changed[:3]} of {len(changed)}"
        inner = original.iterdir() if original.is_dir() else ()
        return labeled(error, {path.name, *(p.name for p in inner)}), shown(error)
    rebuilt = runs.base_state(restoring.net) != base
    found, right = accepted(name, restoring, run), expected(function, original, name)
    if found == right and not rebuilt:
        return "same", ""
    unlike = [k for k in right.state if found.state.get(k) != right.state[k]]
    told = f"{unlike[:3]} of {len(unlike)}, then {found.after[-200:]}"
    unsound = sorted(found.unsound - right.unsound)
    # Of a loaded model these alone have the types and lengths of before.
    parts = ("/ranks", "/num_data") if function == "load" else ("",)
    like = runs.structure(found.state, parts) == runs.structure(right.state, parts)
    broken = rebuilt or _fails(found.after) or not like
    if kind in DAMAGE or unsound or broken:
        return "silently wrong", f"not finite: {unsound[:3]}; unlike: {told}"
    return "valid", told


def _fails(after: str) -> bool:
    """Whether a run takes no step, for a reason other than numbers that are too large.

    Training and prediction refuse numbers that are not finite by themselves.
    """
    return not after.startswith("{") and "finite" not in after and "NaN" not in after


class Bench:
    """The inputs of all trials, written once, and a folder for each trial's copy."""

    def __init__(self, folder: Path, names: tuple[str, ...] = tuple(runs.RUNS)) -> None:
        self.folder, self.names = folder, names
        folder.chmod(0o755)  # some trials have no rights
        stranger = folder / "path" / STRANGER.replace(".", "/")
        stranger.parent.mkdir(parents=True)
        self.trace = folder / "trace"
        code = f"open({str(self.trace)!r}, 'w').close()\n"
        stranger.with_suffix(".py").write_text(code)
        sys.path.insert(0, str(folder / "path"))
        for function, kind in KINDS.items():
            for name in names:
                for number in (1, 2):
                    path = self.original(function, name, number)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    kind.write(path, runs.reference(name, number))
                expected(function, self.original(function, name, 1), name)
                for steps in (0, 1):  # before the processes of the trials begin
                    runs.reference(name, 2, steps)

    def original(self, function: str, name: str, number: int) -> Path:
        """Where an untouched input lies."""
        # No word of a message that names no file.
        file = f"{name}_stored{KINDS[function].suffix}"
        return self.folder / function / str(number) / file

    def run(self, work: Work) -> tuple[str, str]:
        """Do some work in a child; its class and words."""
        found = run(work)
        if self.trace.exists():
            self.trace.unlink()
            return "code executed", found[1]
        return found

    def trial(
        self, function: str, kind: str, name: str, mutate: Mutation, rng: Random
    ) -> Outcome:
        """Write a hostile input of a run and see what comes of it."""
        one, other = (self.original(function, name, number) for number in (1, 2))
        path = self.folder / "trial" / one.name
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir()
        (shutil.copytree if one.is_dir() else shutil.copy)(one, path)
        told = mutate(path, other, rng)
        given = (function, kind, name, (path, one), rng.choice([0, 1]))
        label, words = self.run(partial(judged, *given))
        return Outcome(function, kind, label, f"{name}: {told} -> {words}")

    def trials(self, function: str, count: int, seed: int) -> list[Outcome]:
        """As many trials, the kinds in turn."""
        rng = Random(f"{function} {seed}")
        found: list[Outcome] = []
        for kind, mutate in itertools.cycle(KINDS[function].mutations.items()):
            if len(found) == count:
                break
            try:
                name = rng.choice(self.names)
                found.append(self.trial(function, kind, name, mutate, rng))
            except UNWRITABLE:
                continue
        return found
