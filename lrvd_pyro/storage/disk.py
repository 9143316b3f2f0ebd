"""What reaches the disk, and errors that say what does not."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

__all__ = ["make_folder", "naming", "sync"]


def make_folder(path: Path) -> None:
    """Make a folder and its parents where they are missing, and sync their names."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Let errors of a failed write be OSErrors that say what was not written."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"{target} was not written: {error}") from error
    except OSError as error:
        if error.errno and error.filename is None:  # of a full disk, for example
            error.filename = str(target)
        raise
