"""Disks that refuse a write: full ones and read-only ones, for a forked child."""

import os
import resource
from collections.abc import Callable
from pathlib import Path

NOBODY = 65534


def full(room: int) -> None:
    """No file of this process grows beyond ``room`` bytes; Python ignores SIGXFSZ."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


def raised(work: Callable[[], object], told: Path) -> None:
    """Write the kind and the message of what ``work`` raises to a file."""
    try:
        work()
    except Exception as error:
        told.write_text(f"{type(error).__name__} {isinstance(error, OSError)} {error}")


def as_nobody() -> None:
    """Lose the rights of root, whom no permission stops."""
    if os.geteuid() == 0:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
