"""Readers beside writers see one version of a folder, and read each file once."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from forked import fork, status
from stored import fresh, saved
from versions import NAMES, paused, read, write, write_often

from lrvd_pyro.storage import atomic
from lrvd_pyro.storage.atomic import read_folder
from lrvd_pyro.storage.folder import load

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def test_a_reader_does_not_undo_a_writer_between_its_two_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    write(path, "old")
    aside = threading.Event()

    def wait() -> None:
        aside.set()
        time.sleep(0.2)

    paused(monkeypatch, wait)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write, path, "new")
        assert aside.wait(10)
        assert read(path) == "new"
        writing.result()


@forks
@pytest.mark.parametrize("by_handle", [True, False])
def test_a_reader_beside_two_writers_sees_one_version(
    by_handle: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_BY_HANDLE", by_handle)
    path = tmp_path / "run"
    write(path, "old")
    children = [fork(partial(write_often, path, w, 10**6)) for w in range(2)]
    seen: set[str] = set()
    end = time.monotonic() + 60
    try:
        while len(seen) < 60 and time.monotonic() < end:
            seen.add(read(path))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            status(child)
    assert len(seen) == 60


def test_a_folder_that_is_aside_for_a_moment_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, aside = tmp_path / "run", tmp_path / "aside"
    write(path, "old")
    recover = atomic._recover
    looks = []

    def moved_after_the_first_look(target: Path) -> bool:
        looks.append(target)
        there = recover(target)
        os.rename(*((path, aside) if len(looks) == 1 else (aside, path)))
        return there or len(looks) == 2

    monkeypatch.setattr(atomic, "_recover", moved_after_the_first_look)
    assert read(path) == "old" and len(looks) == 2


def test_a_reader_leaves_nothing_open(tmp_path: Path) -> None:
    def next_handle() -> int:
        handle = os.open(os.devnull, os.O_RDONLY)
        os.close(handle)
        return handle

    write(tmp_path / "run", "old")
    before = next_handle()
    read(tmp_path / "run")
    with pytest.raises(ValueError, match="fourth is missing"):
        read_folder(tmp_path / "run", [*NAMES, "fourth"])
    assert next_handle() == before


def test_files_are_those_of_the_folder_that_was_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    write(path, "old")
    opened = os.stat
    looked = []

    def replaced_meanwhile(name: Path, **options: int | None) -> os.stat_result:
        if str(name) == "second" and not looked:
            looked.append(name)
            os.replace(path, tmp_path / "elsewhere")
            write(path, "new")
        return opened(name, **options)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "stat", replaced_meanwhile)
        assert read(path) == "old"
    assert looked and read(path) == "new"


def test_each_file_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, _ = saved(tmp_path)
    base, opened = fresh(model.base_net), []
    real = os.open

    def counted(name: Path, *args: int, **options: int | None) -> int:
        opened.append(Path(name).name)
        return real(name, *args, **options)

    monkeypatch.setattr(atomic.os, "open", counted)
    load(path, base)
    files = [name for name in opened if "." in name]
    assert sorted(files) == sorted(set(files)) and len(files) == 4


@pytest.mark.parametrize("kind", ["a folder", "a pipe", "a dangling link"])
def test_what_is_not_a_file_is_missing(kind: str, tmp_path: Path) -> None:
    write(tmp_path / "run", "old")
    file = tmp_path / "run" / "second"
    file.unlink()
    make = {"a folder": file.mkdir, "a pipe": partial(os.mkfifo, file)}
    make.get(kind, partial(file.symlink_to, "nothing"))()
    with pytest.raises(ValueError, match="second is missing; the folder holds"):
        read(tmp_path / "run")


def test_a_folder_of_links_is_read(tmp_path: Path) -> None:
    # As the cache of the Hugging Face Hub is.
    write(tmp_path / "blobs", "old")
    (tmp_path / "run").mkdir()
    for name in NAMES:
        (tmp_path / "run" / name).symlink_to(f"../blobs/{name}")
    assert read(tmp_path / "run") == "old"


def test_a_link_to_itself_is_an_oserror_and_no_endless_loop(tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to("run")
    with pytest.raises((OSError, RuntimeError), match="run"):
        read(tmp_path / "run")
