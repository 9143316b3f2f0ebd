"""Folders that are written whole or not at all, and read with errors that say why."""

import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

AnyPath = str | os.PathLike[str]


@contextmanager
def written_whole(path: AnyPath, ours: Collection[str] = ()) -> Iterator[Path]:
    """An empty folder to write in, which takes the place of ``path`` at the end.

    Everything is on disk before the name changes hands; if the block fails, ``path``
    is what it was.

    Args:
        path: The folder to write or replace.
        ours: Names of files that may be replaced; a folder with others is refused.

    Raises:
        ValueError: If ``path`` is a file, or holds something else than ``ours``.
    """
    target = Path(path).resolve()
    recover(target)
    _refuse_to_replace(target, ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: If the file is missing or no JSON object.
    """
    _require(path)
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise _damaged(path, "JSON", error) from error
    if not isinstance(content, dict):
        raise _damaged(path, "a JSON object", f"it is a {type(content).__name__}")
    return content


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU, independent of the file.

    Raises:
        ValueError: If the file is missing, truncated or something else.
    """
    _require(path)
    try:
        return {name: value.clone() for name, value in load_file(path).items()}
    except SafetensorError as error:
        raise _damaged(path, "safetensors", error) from error


def _require(path: Path) -> None:
    if not path.is_file():
        there = sorted(p.name for p in path.parent.glob("*"))
        raise ValueError(
            f"{path} is missing; the folder "
            + (f"holds {there}" if there else "is empty or missing too")
            + "; expected one written by lrvd_pyro.save(path, model, guide)"
        )


def _damaged(path: Path, kind: str, reason: object) -> ValueError:
    return ValueError(
        f"{path} is damaged: expected {kind}, {reason}; copy it anew, or write the "
        f"folder again: save(path, model, guide)"
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
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(target, previous)
    try:
        os.replace(fresh, target)
    except BaseException:
        recover(target)
        raise
    sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on disk."""
    if path.is_dir() and os.name == "nt":  # there, folders cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
