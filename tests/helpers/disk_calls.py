"""What a write asks of the disk, in order: no test can cut the power."""

import os
import re
from pathlib import Path
from typing import Any

import pytest


def disk_calls(monkeypatch: pytest.MonkeyPatch, root: Path) -> list[str]:
    """A list that from now on gets each sync and rename below ``root``, as a text.

    ``*`` stands for the random part of a name, and ``.`` for ``root``.
    """
    calls: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def name(path: Any) -> str:
        where = Path(path).relative_to(root)
        return re.sub(r"\.[0-9a-f]{16}\.", ".*.", str(where))

    def fsync(handle: int) -> None:
        status = os.fstat(handle)
        (path,) = [
            p for p in [root, *root.rglob("*")] if os.path.samestat(p.stat(), status)
        ]
        calls.append(f"sync {name(path)}")
        real_sync(handle)

    def replace(source: Any, target: Any) -> None:
        real_replace(source, target)
        calls.append(f"{name(source)} -> {name(target)}")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    return calls
