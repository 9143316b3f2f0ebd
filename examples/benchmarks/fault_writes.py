"""Writes of `save`, `checkpoint` and `export_peft` that something goes wrong beside.

A process is killed, the disk is full, a folder is read-only, two processes or four
threads write to one path, or a process reads while another writes. Two versions are
written in turn; afterwards one of them must be there, whole, and nothing beside it.
"""

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from functools import partial
from random import Random
from typing import Any

from benchmarks import fault_runs as runs
from benchmarks.fault_exports import NOBODY, fill
from benchmarks.fault_scenes import (
    NAME,
    SAME,
    WRITES,
    Scene,
    Verdict,
    other_run,
    versions,
)
from benchmarks.fault_trials import Bench, Outcome, labeled, shown

from lrvd_pyro.storage import scratch


def _start(work: Callable[[], object], pipe: Any = None) -> Any:
    def guarded() -> None:
        try:
            work()
        except Exception as error:
            if pipe is None:
                raise
            pipe.put(error if isinstance(error, OSError) else _plain(error))

    context: Any = multiprocessing.get_context("fork")
    child = context.Process(target=guarded)
    child.start()
    return child


def _plain(error: Exception) -> Exception:
    """An error of a kind that a pipe takes."""
    named = {kind.__name__: kind for kind in (ValueError, TypeError, RuntimeError)}
    return named.get(type(error).__name__, Exception)(shown(error))


def _worst(*verdicts: Verdict) -> Verdict:
    order = ["same", "refused", "poor error", "state changed", "silently wrong"]
    return max(verdicts, key=lambda each: order.index(each[0]))


def killed(scene: Scene, rng: Random) -> Verdict:
    """A process that writes is killed at some moment; the next write sweeps."""
    if scene.function != "export":
        scene.write(1)
    child = _start(partial(scene.turns, 1, 10_000))
    time.sleep(rng.uniform(0.0, 0.2))
    child.kill()
    child.join()
    found = scene.verdict()
    scratch._DAY = -1.0  # what a killed writer left is swept after a day
    if scene.function == "export":  # the killed one is written again
        for path in scene.path.parent.iterdir():
            if path.name[0] != ".":
                shutil.rmtree(path)
        names = {p.name.split(".")[1] for p in scene.path.parent.iterdir()}
        for name in names:
            Scene("export", scene.path.with_name(name), scene.known).write(1)
    else:
        scene.write(2)
    return _worst(found, scene.verdict(), scene.left_behind())


def _failing(
    scene: Scene, hinder: Callable[[], object], mend: Callable[[], object]
) -> Verdict:
    """A write that fails leaves the version before, and the run, as they were."""
    if scene.function != "export":
        scene.write(1)
    written = runs.reference(NAME, 2)
    before = runs.bits(runs.state_of(written))
    error: BaseException | None = None
    hinder()
    try:
        scene.write(2)
    except BaseException as raised:
        error = raised
    mend()
    after = runs.bits(runs.state_of(written))  # before what reading draws
    found = [scene.verdict(1 if error else 2), scene.left_behind()]
    if error and (changed := [k for k in before if before[k] != after.get(k)]):
        found.append(("state changed", f"{changed[:3]} of the run"))
    if error is not None:
        names = {scene.path.name, f".{scene.path.name}."}
        found.append((labeled(error, names), shown(error)))
    return _worst(*found)


def disk_full(scene: Scene, rng: Random) -> Verdict:
    """Files stop growing at some length."""
    limit = rng.choice([0, 100, rng.randrange(30_000)])
    return _failing(scene, partial(fill, limit), partial(fill, -1))


def read_only(scene: Scene, rng: Random) -> Verdict:
    """A folder without the right to write."""
    home = scene.path.parent

    def hinder() -> None:
        home.chmod(0o555)
        if os.getuid() == 0:
            os.seteuid(NOBODY)

    def mend() -> None:
        if os.getuid() == 0:
            os.seteuid(0)
        home.chmod(0o755)

    return _failing(scene, hinder, mend)


def _together(scene: Scene, works: list[Callable[[], object]]) -> Verdict:
    """Processes that write to one path: their errors, and what is there at last."""
    context: Any = multiprocessing.get_context("fork")
    errors = context.Queue()
    children = [_start(work, errors) for work in works]
    for child in children:
        child.join()
    found = [scene.verdict(), scene.left_behind()]
    time.sleep(0.02)  # the queue's own thread
    while not errors.empty():
        found.append(_of_two(scene, errors.get()))
    return _worst(*found)


def _of_two(scene: Scene, error: Exception) -> Verdict:
    """The class of an error of one who writes beside another."""
    label = labeled(error, {scene.path.name})
    # The system's own words do not say that another writer was there.
    return "poor error" if isinstance(error, OSError) else label, shown(error)


def two_writers(scene: Scene, rng: Random) -> Verdict:
    """Two processes write to one path."""
    return _together(scene, [partial(scene.turns, each, 15) for each in (0, 1)])


def one_number(scene: Scene, rng: Random) -> Verdict:
    """Two processes of one number, as in two containers, write to one path."""

    def write(first: int) -> None:
        vars(os)["getpid"] = lambda: 1
        scene.turns(first, 15)

    return _together(scene, [partial(write, each) for each in (0, 1)])


def reader(scene: Scene, rng: Random) -> Verdict:
    """A process reads while another writes: it sees one version each time."""
    scene.write(1)
    other_run()
    child = _start(partial(scene.turns, 1, 40))
    found = SAME
    while child.is_alive() and found == SAME:
        found = scene.verdict()
    child.kill()
    child.join()
    return found


def threads(scene: Scene, rng: Random) -> Verdict:
    """Four threads write to one path, each a run of its own."""
    errors: list[Exception] = []

    def write(written: runs.Run) -> None:
        try:
            for _ in range(8):
                WRITES[scene.function].write(scene.path, written)
        except Exception as error:
            errors.append(error)

    copies = [runs.trained(NAME, 1 + number % 2) for number in range(4)]
    them = [threading.Thread(target=write, args=(each,)) for each in copies]
    for thread in them:
        thread.start()
    for thread in them:
        thread.join()
    found = [_of_two(scene, error) for error in errors]
    return _worst(scene.verdict(), scene.left_behind(), *found)


Situation = Callable[[Scene, Random], Verdict]
ALONE: dict[str, Situation] = {
    "killed": killed,
    "disk full": disk_full,
    "read-only": read_only,
}
TOGETHER: dict[str, Situation] = {
    "two writers": two_writers,
    "two writers, one number": one_number,
    "reader beside writer": reader,
    "four threads": threads,
}


def trials(
    bench: Bench,
    kills: int,
    others: int,
    seed: int,
    only: Collection[str] = tuple(WRITES),
) -> list[Outcome]:
    """Every situation of every function.

    An export takes a new folder, so nobody reads or writes beside it.
    """
    found = []
    for function in only:
        known = versions(function, bench.folder / "versions" / function)
        for kind, situation in (ALONE | TOGETHER).items():
            if function == "export" and kind in TOGETHER:
                continue
            rng = Random(f"{function} {kind} {seed}")
            for number in range(kills if kind == "killed" else others):
                home = bench.folder / "writes" / f"{function} {kind} {number}"
                home.mkdir(parents=True)
                scene = Scene(function, home / "run", known)
                label, told = bench.run(partial(situation, scene, rng))
                rng.random()  # the child drew from a copy
                found.append(Outcome(function, kind, label, told))
    return found
