"""Several writers of one folder, and killed ones: always one whole version of it."""

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from forked import fork, status
from versions import NAMES, names, paused, read, write, write_often

from lrvd_pyro.storage import atomic, scratch
from lrvd_pyro.storage.atomic import written_whole

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


# Writers


@forks
def test_writers_with_one_process_number_leave_one_whole_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as in containers
    path = tmp_path / "run"
    children = [fork(partial(write_often, path, writer)) for writer in range(3)]
    assert [status(child) for child in children] == [0, 0, 0]
    assert read(path).endswith(" 59")
    assert names(tmp_path) == ["run"]


def test_threads_leave_one_whole_version(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(partial(write_often, path, times=20), range(4)))
    assert read(path).endswith(" 19")
    assert names(tmp_path) == ["run"]


def test_a_writer_whose_place_was_taken_replaces_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, others = tmp_path / "run", [tmp_path / "other", tmp_path / "third"]
    for folder in (path, *others):
        write(folder, "old")
    paused(monkeypatch, lambda: others and os.rename(others.pop(), path))
    write(path, "new")
    assert not others and read(path) == "new"
    assert names(tmp_path) == ["run"]


def test_a_writer_goes_on_where_another_has_moved_the_old_folder_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, replace = tmp_path / "run", os.replace
    write(path, "old")

    def too_late(source: Path, target: Path) -> None:
        if source == path:
            replace(path, tmp_path / "elsewhere")
        replace(source, target)

    monkeypatch.setattr(os, "replace", too_late)
    write(path, "new")
    assert read(path) == "new" and names(tmp_path) == ["elsewhere", "run"]


def test_a_file_that_came_meanwhile_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    with pytest.raises(ValueError, match=r"holds \['notes'\], which would be lost"):
        with written_whole(path, NAMES) as folder:
            (folder / "first").touch()
            path.mkdir()
            (path / "notes").write_text("mine")
    assert (path / "notes").read_text() == "mine"
    assert names(tmp_path) == ["run"]


# Kills


@forks
def test_killed_writers_leave_one_whole_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_MOMENT", 0.05)
    path, draw = tmp_path / "run", random.Random(0)
    write(path, "old")
    for _ in range(10):
        children = [fork(partial(write_often, path, w, 10**6)) for w in range(2)]
        for child in children:
            time.sleep(draw.random() * 0.05)
            os.kill(child, signal.SIGKILL)
        assert [status(child) for child in children] == [-signal.SIGKILL] * 2
        read(path)
    write(path, "new")
    assert read(path) == "new"


@forks
@pytest.mark.parametrize("by", ["a reader", "a writer"])
def test_a_version_that_a_killed_writer_moved_aside_is_put_back(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    monkeypatch.setattr(atomic, "_MOMENT", 0.05)
    write(path, "old")

    def work() -> None:
        paused(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        write(path, "new")

    assert status(fork(work)) == -signal.SIGKILL
    assert not path.exists()
    if by == "a writer":
        with pytest.raises(KeyError), written_whole(path, NAMES):
            raise KeyError
        assert (path / "first").read_text() == "old"
    assert read(path) == "old"


def test_the_version_that_was_moved_aside_last_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_MOMENT", 0.05)
    for version in ("second", "third", "first"):
        write(tmp_path / version, version)
        # The content may be as old as it likes.
        os.utime(tmp_path / version, (0, 0))
    for letter, version in ("f", "first"), ("0", "second"), ("a", "third"):
        time.sleep(0.02)  # longer than the clock of a file system ticks
        os.rename(tmp_path / version, tmp_path / f".run.{letter * 16}.previous")
    assert read(tmp_path / "run") == "third"


def test_a_version_that_is_being_removed_is_never_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    write(path, "old")
    removed = []

    def rmtree(folder: Path, **_: object) -> None:
        removed.append(folder.name)

    monkeypatch.setattr(scratch.shutil, "rmtree", rmtree)
    write(path, "new")
    assert all(name.endswith(".new") for name in removed) and removed
    assert not list(tmp_path.glob(".run.*.previous"))


# Leftovers


def test_leftovers_go_after_a_day_and_nothing_else_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "0123456789abcdef"
    write(tmp_path / "run", "zeroth")
    stale = [f".run.{token}.new", f".run.{token}.previous", ".run.4321.new"]
    stale += [".run.previous"]
    others = [f".run.b.{token}.new", f".run.b.{token}.previous", ".run.mine", "run.new"]
    others += [f".run.{token}.partial", ".run.1.previous"]
    for name in stale + others:
        (tmp_path / name).mkdir()
        (tmp_path / name / "first").touch()
    write(tmp_path / "run", "first")
    assert names(tmp_path) == sorted(["run", *stale, *others])  # in use, perhaps
    later = time.time() + 25 * 3600
    monkeypatch.setattr(scratch.time, "time", lambda: later)
    write(tmp_path / "run", "second")
    assert names(tmp_path) == sorted(["run", *others])


def test_an_old_version_that_was_moved_aside_just_now_is_in_use(
    tmp_path: Path,
) -> None:
    path, aside = tmp_path / "run", tmp_path / ".run.0123456789abcdef.previous"
    for folder in (path, aside):
        write(folder, "old")
    os.utime(aside, (0, 0))  # the content is old, the rename is not
    write(path, "new")
    assert aside.exists()


def test_the_only_version_is_put_back_and_never_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, later = tmp_path / "run", time.time() + 25 * 3600
    write(tmp_path / ".run.previous", "old")
    monkeypatch.setattr(scratch.time, "time", lambda: later)
    monkeypatch.setattr(atomic, "_MOMENT", 0.05)
    with pytest.raises(KeyError), written_whole(path, NAMES):
        raise KeyError
    assert read(path) == "old" and names(tmp_path) == ["run"]
