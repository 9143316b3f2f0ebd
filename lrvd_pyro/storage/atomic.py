"""Folders that are written whole or not at all, and files read with clear errors."""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

__all__ = [
    "AnyPath",
    "read_folder",
    "read_json",
    "read_tensors",
    "recover",
    "sync",
    "written_whole",
]

AnyPath = str | os.PathLike[str]


@contextmanager
def written_whole(path: AnyPath, ours: Collection[str] = ()) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``path`` when the block ends.

    Every file is on disk before the name changes hands. If the block fails, ``path``
    stays as it was.

    Args:
        path: The folder to write or replace.
        ours: Names of files that may be replaced. A folder with other files is refused.

    Raises:
        ValueError: If ``path`` is a file, or holds something else than ``ours``.
    """
    target = Path(path).resolve()
    recover(target)
    _refuse_to_replace(target, ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: a rename is atomic only within one file system.
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        # A rename may reach the disk before the data do. Without this, a power cut
        # could leave empty files under the final name.
        for item in [*fresh.iterdir(), fresh]:
            sync(item)
        _put(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def recover(path: AnyPath) -> None:
    """Give ``path`` back the folder that a killed `written_whole` had moved aside."""
    target = Path(path).resolve()
    if not target.exists() and _previous(target).exists():
        os.replace(_previous(target), target)


def read_folder(path: Path, names: Collection[str]) -> dict[str, bytes]:
    """Read the files of a folder.

    Raises:
        ValueError: If a file is missing.
    """
    for name in names:
        _require(path / name)
    return {name: (path / name).read_bytes() for name in names}


def read_json(path: Path, content: bytes) -> dict[str, Any]:
    """Give the JSON object in a file's content.

    Raises:
        ValueError: If it is not a JSON object, or holds NaN or infinity.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}, which is no JSON")

    try:
        found = json.loads(content, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "JSON", error) from error
    if not isinstance(found, dict):
        reason = f"it is a {type(found).__name__}"
        raise _damaged(path, "a JSON object", reason)
    return found


def read_tensors(path: Path, content: bytes) -> dict[str, Tensor]:
    """Give the tensors in the content of a safetensors file, on the CPU.

    Raises:
        ValueError: If it is truncated or something else.
    """
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(path, "safetensors", error) from error


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _require(path: Path) -> None:
    if not path.is_file():
        names = sorted(p.name for p in path.parent.glob("*"))
        raise ValueError(
            f"{path} is missing; the folder "
            + (f"holds {names}" if names else "is empty or missing too")
            + "; expected a folder that lrvd_pyro.save(path, model, guide) wrote"
        )


def _damaged(path: Path, kind: str, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged: {reason}; expected {kind}. Copy the file again, or write "
        f"the folder again: save(path, model, guide)"
    )


def _refuse_to_replace(target: Path, ours: Collection[str]) -> None:
    if not target.exists():
        return
    names = [p.name for p in target.iterdir()] if target.is_dir() else ["a file"]
    if foreign := sorted(set(names) - set(ours)):
        raise ValueError(
            f"{target} holds {foreign}, which would be lost; give a path that does not "
            f"exist, or remove it: shutil.rmtree(path)"
        )


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _put(fresh: Path, target: Path) -> None:
    """Let ``fresh`` take the place of ``target``, or leave all as it is."""
    previous = _previous(target)
    if target.exists():
        # os.replace refuses a target folder with files in it, so the old one moves
        # aside first. After a kill between the two renames, `recover` moves it back.
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    try:
        os.replace(fresh, target)
    except BaseException:
        recover(target)
        raise
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)
