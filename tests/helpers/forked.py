"""Work in children of this warm process, which may be killed."""

import os
import sys
from collections.abc import Callable


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child of this warm process; its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def status(pid: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
