"""The file of a checkpoint: on disk before its name, one version for each reader."""

import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from disk_calls import disk_calls
from forked import fork, status
from small_disk import full, raised

from lrvd_pyro.storage import scratch
from lrvd_pyro.training import tree_file
from lrvd_pyro.training.checkpoints import checkpoint, resume

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def tree(version: int, size: int = 1000) -> dict[str, Any]:
    return {"version": version, "tensor": torch.full((size,), float(version))}


def write_often(path: Path, numbers: range) -> None:
    for number in numbers:
        tree_file.write(path, tree(number))


def read(path: Path) -> int:
    """The version of a file, which is the same in its header and its tensors."""
    content, _ = tree_file.read(path)
    version: int = content["version"]
    assert torch.equal(content["tensor"], tree(version)["tensor"])
    return version


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_on_disk_before_its_name_and_its_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.fresh("svi")
    runs.train(run, 1)
    calls = disk_calls(monkeypatch, tmp_path)
    for _ in range(2):
        checkpoint(tmp_path / "a" / "b" / "run", **run)
    parents = ["sync .", "sync a"]
    file = ["sync a/b/.run.*.partial", "a/b/.run.*.partial -> a/b/run", "sync a/b"]
    assert calls == [*parents, *file, *file]


@forks
def test_a_full_disk_leaves_the_old_checkpoint_and_raises_a_named_oserror(
    tmp_path: Path,
) -> None:
    path, told = tmp_path / "run", tmp_path / "told"
    tree_file.write(path, tree(0))

    def work() -> None:
        full(20_000)
        raised(partial(tree_file.write, path, tree(1, 100_000)), told)

    assert status(fork(work)) == 0
    message = told.read_text()
    assert message.startswith("OSError True") and f"too large: '{path}'" in message
    assert read(path) == 0 and names(tmp_path) == ["run", "told"]


@forks
def test_two_writers_and_a_reader_share_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "run"
    tree_file.write(path, tree(0))
    work = [range(w * 100, w * 100 + 50) for w in (1, 2)]
    children = [fork(partial(write_often, path, numbers)) for numbers in work]
    seen, done = set(), [False, False]
    while not all(done):
        seen.add(read(path))
        done = [d or exited(c) for d, c in zip(done, children)]
    assert read(path) in {numbers[-1] for numbers in work}
    assert len(seen) > 5 and names(tmp_path) == ["run"]


def exited(pid: int) -> bool:
    """Whether a child has ended, without an error."""
    ended, code = os.waitpid(pid, os.WNOHANG)
    assert code == 0
    return ended == pid


@forks
def test_what_a_killed_checkpoint_leaves_is_swept_after_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"

    def work() -> None:
        monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        tree_file.write(path, tree(0))

    assert status(fork(work)) == -signal.SIGKILL
    (left,) = names(tmp_path)
    (tmp_path / ".run.partial").touch()  # of version 0.1
    (tmp_path / ".run.2.0123456789abcdef.partial").touch()  # of another checkpoint
    tree_file.write(path, tree(1))
    assert len(names(tmp_path)) == 4 and left in names(tmp_path)
    later = time.time() + 25 * 3600
    monkeypatch.setattr(scratch.time, "time", lambda: later)
    tree_file.write(path, tree(2))
    assert names(tmp_path) == [".run.2.0123456789abcdef.partial", "run"]


def test_a_checkpoint_is_opened_once_and_has_the_permissions_of_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, run = tmp_path / "run", runs.fresh("svi")
    before = os.umask(0o027)
    try:
        checkpoint(path, **run)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    read_bytes = Path.read_bytes

    def read_and_remove(file: Path) -> bytes:
        content = read_bytes(file)
        file.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_and_remove)
    resume(path, **run)
    assert not path.exists()
