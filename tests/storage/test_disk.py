"""What reaches the disk in which order, and what stays when a disk refuses."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from disk_calls import disk_calls
from forked import fork, status
from safetensors.torch import save_file
from small_disk import as_nobody, full, raised
from stored import perturbed, saved

from lrvd_pyro.storage import atomic
from lrvd_pyro.storage.atomic import read_folder, written_file, written_whole
from lrvd_pyro.storage.folder import save

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")


def write(path: Path, *names: str) -> None:
    with written_whole(path, ("one", "two")) as folder:
        for name in names:
            (folder / name).write_text(name)


def listing(folder: Path) -> dict[str, str]:
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {str(p.relative_to(folder)): p.read_text() for p in files}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may enter, which ``tmp_path`` is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


# The order


def test_a_new_folder_is_on_disk_before_its_name_and_its_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = disk_calls(monkeypatch, tmp_path)
    write(tmp_path / "run", "one", "two")
    assert sorted(calls[:2]) == ["sync .run.*.new/one", "sync .run.*.new/two"]
    assert calls[2:] == ["sync .run.*.new", ".run.*.new -> run", "sync ."]


def test_an_old_folder_goes_after_the_name_of_the_new_one_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", "one")
    calls = disk_calls(monkeypatch, tmp_path)
    write(tmp_path / "run", "one")
    assert calls == [
        "sync .run.*.new/one",
        "sync .run.*.new",
        "run -> .run.*.previous",
        ".run.*.new -> run",
        "sync .",
        # Removed under a name that no reader takes for a version.
        ".run.*.previous -> .run.*.new",
    ]


def test_the_names_of_new_parents_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = disk_calls(monkeypatch, tmp_path)
    write(tmp_path / "a" / "b" / "run", "one")
    assert calls[:2] == ["sync .", "sync a"]
    assert calls[-2:] == ["a/b/.run.*.new -> a/b/run", "sync a/b"]


def test_files_in_folders_are_on_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = disk_calls(monkeypatch, tmp_path)
    with written_whole(tmp_path / "run") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "one").write_text("one")
    assert {"sync .run.*.new/deep", "sync .run.*.new/deep/one"} < set(calls[:3])


# Refusals


@forks
@pytest.mark.parametrize("by", ["python", "safetensors"])
def test_a_full_disk_leaves_the_old_version_and_raises_a_named_oserror(
    by: str, tmp_path: Path
) -> None:
    write(tmp_path / "run", "one")
    told = tmp_path / "told"

    def grow() -> None:
        with written_whole(tmp_path / "run", ("one",)) as folder:
            if by == "python":
                (folder / "one").write_bytes(bytes(100_000))
            else:
                save_file({"x": torch.zeros(100_000)}, folder / "one")

    def work() -> None:
        full(1000)
        raised(grow, told)

    assert status(fork(work)) == 0
    message = told.read_text()
    assert message.startswith("OSError True") and f"{tmp_path}/run" in message
    assert "too large" in message
    told.unlink()
    assert listing(tmp_path) == {"run/one": "one"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@forks
def test_a_read_only_parent_leaves_the_old_version_and_is_named(
    open_folder: Path,
) -> None:
    write(open_folder / "run", "one")
    (open_folder / "told").touch()
    (open_folder / "told").chmod(0o666)
    open_folder.chmod(0o555)

    def work() -> None:
        as_nobody()
        raised(partial(write, open_folder / "run", "one"), open_folder / "told")

    assert status(fork(work)) == 0
    open_folder.chmod(0o755)
    told = (open_folder / "told").read_text()
    assert told.startswith("PermissionError True")
    assert f"Permission denied: '{open_folder}/.run." in told
    assert sorted(p.name for p in open_folder.iterdir()) == ["run", "told"]
    assert read_folder(open_folder / "run", ["one"]) == {"one": b"one"}


@forks
def test_a_reader_needs_no_right_to_write(open_folder: Path) -> None:
    write(open_folder / "run", "one")
    open_folder.chmod(0o111)  # nor to list the parent

    def work() -> None:
        as_nobody()
        assert read_folder(open_folder / "run", ["one"]) == {"one": b"one"}

    assert status(fork(work)) == 0
    open_folder.chmod(0o755)


def test_a_failed_cleanup_does_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise PermissionError("not yours")

    for name in ("rmdir", "unlink"):
        monkeypatch.setattr(os, name, fails)
    with pytest.raises(KeyError, match="the first"):
        with written_whole(tmp_path / "run") as folder:
            (folder / "one").write_text("one")
            raise KeyError("the first")
    with pytest.raises(KeyError, match="the first"):
        with written_file(tmp_path / "file") as file:
            file.write_text("one")
            raise KeyError("the first")


def test_a_name_that_does_not_reach_the_disk_is_an_error_without_leftovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run", "one")
    sync = atomic.sync

    def fails(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        sync(path)

    monkeypatch.setattr(atomic, "sync", fails)
    with pytest.raises(OSError, match=f"Input/output error: '{tmp_path}/run'"):
        write(tmp_path / "run", "one", "two")
    assert listing(tmp_path) == {"run/one": "one", "run/two": "two"}
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"exists: '{tmp_path}/file'"):
        write(tmp_path / "file" / "deep" / "run", "one")


# Permissions


def test_permissions_are_those_of_mkdir_and_open(tmp_path: Path) -> None:
    path, model, guide = saved(tmp_path)
    perturbed(model, guide)
    before = os.umask(0o027)
    try:
        save(path, model, guide)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o640}
