"""A folder of three files that all hold the name of its version."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lrvd_pyro.storage.atomic import read_folder, written_whole

NAMES = ("first", "second", "third")


def write(path: Path, version: str) -> None:
    with written_whole(path, NAMES) as folder:
        for name in NAMES:
            (folder / name).write_text(version)


def write_often(path: Path, writer: int, times: int = 60) -> None:
    for version in range(times):
        write(path, f"{writer} {version}")


def read(path: Path) -> str:
    """The version of a folder, which is the same in every file."""
    (version,) = set(read_folder(path, NAMES).values())
    return version.decode()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def paused(monkeypatch: pytest.MonkeyPatch, between: Callable[[], object]) -> None:
    """Do something when a writer has moved the old folder aside."""
    replace = os.replace

    def with_pause(source: Path, target: Path) -> None:
        replace(source, target)
        if str(target).endswith(".previous"):
            between()

    monkeypatch.setattr(os, "replace", with_pause)
