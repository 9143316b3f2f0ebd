"""Temporary files and folders beside the one that they are to become.

Their names are ``.<name>.<random>.<kind>``, where the kind is

- "new": a folder that is being written;
- "partial": a file that is being written;
- "previous": a whole folder that makes room for a new one.

Names are random, since process numbers are not unique: every container counts its own.
"""

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["discard", "scratch_path", "sweep", "versions", "when_changed"]

_DAY = 24 * 60 * 60.0  # seconds
# Version 0.1 wrote a process number, or nothing, in place of the random part.
_MIDDLES = {
    "new": r"\.(\d+|[0-9a-f]{16})",
    "partial": r"(\.[0-9a-f]{16})?",
    "previous": r"(\.[0-9a-f]{16})?",
}


def scratch_path(target: Path, kind: str) -> Path:
    """Give a path beside ``target`` that no other writer uses."""
    # Beside the target: a rename is atomic only within one file system.
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.{kind}")


def versions(target: Path) -> list[Path]:
    """List ``target`` and the folders that were moved aside for it, at one moment.

    While writers replace a folder, one of its versions is always there.
    """
    if os.path.lexists(target):  # and the parent need not be readable
        return [target]
    names = _names(target.parent)
    there = [target] if target.name in names else []
    return there + _scratch(target, "previous", names)


def sweep(target: Path, *kinds: str) -> None:
    """Remove what killed writers left beside ``target``.

    Only what is older than a day is taken for that: younger ones may be in use.

    Args:
        target: The file or folder that was to be written.
        kinds: What to remove. "previous" only where ``target`` exists, since it may be
            the only version otherwise.
    """
    names = _names(target.parent)
    for path in [path for kind in kinds for path in _scratch(target, kind, names)]:
        if time.time() - when_changed(path) > _DAY:
            discard(path)


def discard(path: Path) -> None:
    """Remove a file or folder, as far as that is possible, and raise nothing."""
    with suppress(OSError):
        if not path.is_dir():
            path.unlink()
            return
        # Under another name, so that nobody takes a half removed folder for a version.
        doomed = path.with_suffix(".new")
        os.replace(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def when_changed(path: Path) -> float:
    """When a path was last changed or renamed, in seconds; 0 if it is gone."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0.0
    # A rename sets ctime, and leaves mtime as old as the content.
    return max(status.st_mtime, status.st_ctime)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _scratch(target: Path, kind: str, names: Iterable[str]) -> list[Path]:
    """Those of the names that are temporary ones of one kind beside ``target``."""
    pattern = re.compile(rf"\.{re.escape(target.name)}{_MIDDLES[kind]}\.{kind}")
    return [target.with_name(name) for name in names if pattern.fullmatch(name)]
