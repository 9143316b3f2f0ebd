"""Work in a process that may crash, hang or swell; the others go on."""

import multiprocessing
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

Work = Callable[[], tuple[str, str]]  # gives a class and words

HARNESS = "the harness failed"
SECONDS, BYTES = 20, 2 << 30


def run(work: Work) -> tuple[str, str]:
    """Do some work in a child; its class and words."""
    context: Any = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    sys.stdout.flush()
    child = context.Process(target=_child, args=(work, sender))
    child.start()
    sender.close()
    found = "hung", f"more than {SECONDS} s"
    try:
        if receiver.poll(SECONDS):
            found = receiver.recv()
    except EOFError:
        child.join()
        number = child.exitcode or 0
        found = "crashed", signal.Signals(-number).name if number < 0 else "exit"
    else:
        os.killpg(child.pid, signal.SIGKILL)  # with what it has started
    child.join()
    if found[0] == HARNESS:
        raise AssertionError(found[1])
    return found


def _child(work: Work, sender: Any) -> None:
    os.setpgid(0, 0)
    warnings.simplefilter("ignore")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        sender.send(work())
    except MemoryError:
        sender.send(("memory", "MemoryError"))
    except BaseException:
        sender.send((HARNESS, traceback.format_exc()))
