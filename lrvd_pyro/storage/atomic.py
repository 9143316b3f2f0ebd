"""Folders and files that are written whole or not at all, and read with clear errors.

Any number of processes and threads may write and read one path at the same time: each
write ends with a whole version in place, and each reader sees one version.
"""

import errno
import json
import os
import shutil
import stat
import time
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from lrvd_pyro.storage.disk import make_folder, naming, sync
from lrvd_pyro.storage.scratch import (
    discard,
    scratch_path,
    sweep,
    versions,
    when_changed,
)

__all__ = [
    "AnyPath",
    "read_folder",
    "read_json",
    "read_tensors",
    "written_file",
    "written_whole",
]

AnyPath = str | os.PathLike[str]

_MOMENT = 1.0  # seconds that a live writer may need between two renames
# Windows opens no folders.
_BY_HANDLE = os.open in os.supports_dir_fd


@contextmanager
def written_whole(path: AnyPath, ours: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block ends.

    Every file is on disk before the name changes hands. If the block fails, ``path``
    stays as it was. Temporary folders of killed writers are removed after a day.

    Args:
        path: The folder to write or replace.
        ours: Names of files that may be replaced. A folder with other files is refused.

    Raises:
        ValueError: If ``path`` is a file, or holds something else than ``ours``.
        OSError: If the disk is full or read-only, or the folder cannot be written.
    """
    target = Path(path).resolve()
    kinds = ("new", "previous") if _recover(target) else ("new",)
    _refuse_to_replace(target, ours)
    make_folder(target.parent)
    sweep(target, *kinds)
    fresh = scratch_path(target, "new")
    fresh.mkdir()
    try:
        with naming(target):
            yield fresh
            # A rename may reach the disk before the data do. Without this, a power cut
            # could leave empty files under the final name.
            for item in [*fresh.rglob("*"), fresh]:
                sync(item)
            _put(fresh, target, ours)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def written_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that takes the place of ``path`` at the block's end.

    The file is on disk before the name changes hands. If the block fails, ``path``
    stays as it was. Temporary files of killed writers are removed after a day.

    Args:
        path: The file to write or replace.

    Raises:
        OSError: If the disk is full or read-only, or the file cannot be written.
    """
    make_folder(path.parent)
    sweep(path, "partial")
    fresh = scratch_path(path, "partial")
    try:
        with naming(path):
            yield fresh
            sync(fresh)
            os.replace(fresh, path)
            sync(path.parent)
    finally:
        discard(fresh)


def read_folder(path: AnyPath, names: Collection[str]) -> dict[str, bytes]:
    """Read files of a folder, each once, all of one version.

    A folder that a killed `written_whole` had moved aside is put back first.

    Args:
        path: The folder.
        names: The files to read.

    Returns:
        The content of each file by its name.

    Raises:
        ValueError: If a file is missing.
    """
    folder = Path(path)
    content: dict[str, bytes] = {}
    while _recover(folder.resolve()):
        before = _identity(folder)
        content = _contents(folder, names)
        same = before is not None and _identity(folder) == before
        if content.keys() >= {*names} and (_BY_HANDLE or same):
            return content
        if same:
            break
        # A writer has replaced the folder meanwhile: read the new one.
    raise _missing(folder, next(name for name in names if name not in content))


def read_json(content: bytes, path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        content: The content of a file.
        path: The file, for messages.

    Raises:
        ValueError: If it is not a JSON object, or holds NaN or infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no JSON")

    try:
        read = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "JSON", error) from error
    if not isinstance(read, dict):
        reason = f"it is a {type(read).__name__}"
        raise _damaged(path, "a JSON object", reason)
    return read


def read_tensors(content: bytes, path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file to the CPU.

    Args:
        content: The content of a file.
        path: The file, for messages.

    Raises:
        ValueError: If it is truncated or something else.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, "safetensors", error) from error


def _recover(target: Path) -> bool:
    """Tell whether ``target`` exists, and put back what a killed writer moved aside."""
    end = time.monotonic() + _MOMENT
    while target not in (there := versions(target)):
        if not there:
            return False
        if time.monotonic() < end:  # a live writer may be between its two renames
            time.sleep(_MOMENT / 100)
            continue
        with suppress(FileNotFoundError):  # someone else has put it back
            _placed(max(there, key=when_changed), target)
    return True


def _put(fresh: Path, target: Path, ours: Collection[str]) -> None:
    """Let ``fresh`` take the place of ``target``, or leave all as it is."""
    previous = scratch_path(target, "previous")
    try:
        while not _placed(fresh, target):
            # Once more, since another writer may have been here.
            _refuse_to_replace(target, ours)
            discard(previous)  # of the last round, and older than what stands there now
            with suppress(FileNotFoundError):  # another writer has moved it aside
                os.replace(target, previous)
    except BaseException:
        # A failure here is the lesser one, and `_recover` tries again.
        with suppress(OSError):
            _placed(previous, target)
        raise
    try:
        sync(target.parent)
    finally:
        discard(previous)


def _placed(folder: Path, target: Path) -> bool:
    """Rename a folder, unless another one with files in it stands there."""
    try:
        os.replace(folder, target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST) or target.is_dir():
            return False
        raise
    return True


def _refuse_to_replace(target: Path, ours: Collection[str]) -> None:
    try:
        names = os.listdir(target)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = ["a file"] if target.exists() else []
    if foreign := sorted(set(names) - set(ours)):
        raise ValueError(
            f"{target} holds {foreign}, which would be lost; give a path that does not "
            f"exist, or remove it: shutil.rmtree(path)"
        )


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What another version of a folder has not; None if no folder is there."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def _contents(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read those of the files that are there."""
    with ExitStack() as stack:
        handle, base = None, folder
        if _BY_HANDLE:
            # It stays with this version when the folder is renamed.
            try:
                handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            except (FileNotFoundError, NotADirectoryError):
                return {}
            stack.callback(os.close, handle)
            base = Path()
        files = {}
        # All are opened before one is read: a writer may remove this version meanwhile.
        for name in names:
            with suppress(FileNotFoundError, NotADirectoryError):
                # Opening a pipe would wait for its writer.
                if stat.S_ISREG(os.stat(base / name, dir_fd=handle).st_mode):
                    opener = partial(os.open, dir_fd=handle)
                    file = open(base / name, "rb", opener=opener)
                    files[name] = stack.enter_context(file)
        return {name: file.read() for name, file in files.items()}


def _missing(folder: Path, name: str) -> ValueError:
    names = sorted(p.name for p in folder.glob("*"))
    return ValueError(
        f"{folder / name} is missing; the folder "
        + (f"holds {names}" if names else "is empty or missing too")
        + "; expected a folder that lrvd_pyro.save(path, model, guide) wrote"
    )


def _damaged(path: Path, kind: str, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged: {reason}; expected {kind}. Copy the file again, or write "
        f"the folder again: save(path, model, guide)"
    )
