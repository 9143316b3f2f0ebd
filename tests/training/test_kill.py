"""Runs that are killed at random moments end bit for bit where they would have."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import runs
from forked import fork, status
from runs import DRIVERS, STEPS

from lrvd_pyro.training import tree_file as packed
from lrvd_pyro.training.checkpoints import resume

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore:This process:DeprecationWarning"),
]

STAGES = ("half written", "written", "synced", "renamed")


def killed_from_outside(folder: Path, driver: str, count: int, delay: float) -> None:
    """Kill a run some time after its ``count``-th checkpoint, wherever it is then."""
    reading, writing = os.pipe()
    pid = fork(partial(runs.complete, folder, driver, partial(os.write, writing, b".")))
    os.close(writing)
    for _ in range(count):
        os.read(reading, 1)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.close(reading)
    assert status(pid) == -signal.SIGKILL


def killed_in_the_write(folder: Path, driver: str, count: int, stage: str) -> None:
    """Kill a run at a stage of the write that follows its ``count``-th checkpoint."""
    done = [0]

    def die_at(here: str) -> None:
        if here == stage and done[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    def write_bytes(path: Path, content: bytes) -> None:
        real_write(path, content)
        if stage == "half written" and done[0] == count:
            os.truncate(path, path.stat().st_size // 2)
        die_at("half written")
        die_at("written")

    def replace(source: Path, target: Path) -> None:
        die_at("synced")
        real_replace(source, target)
        die_at("renamed")
        done[0] += 1

    def work() -> None:
        Path.write_bytes, os.replace = write_bytes, replace
        runs.complete(folder, driver)

    real_write, real_replace = Path.write_bytes, os.replace
    assert status(fork(work)) == -signal.SIGKILL


def steps_saved(path: Path) -> int:
    return int(packed.read(path)[0]["elbo"]["step"]) if path.exists() else 0


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_killed_run_ends_bit_for_bit_where_it_would_have(
    driver: str, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    began = time.monotonic()
    assert status(fork(partial(runs.complete, whole, driver))) == 0
    each = (time.monotonic() - began) / STEPS
    draw = random.Random(driver)
    for moment in range(10):
        folder = tmp_path / str(moment)
        folder.mkdir()
        count = draw.randrange(STEPS - 3)
        path = folder / "run.safetensors"
        if moment % 2:
            stage = STAGES[moment // 2 % 4]
            killed_in_the_write(folder, driver, count, stage)
            assert steps_saved(path) == count + (stage == "renamed")
        else:
            killed_from_outside(folder, driver, count, draw.random() * each)
            assert count <= steps_saved(path) < STEPS
        assert not (folder / "end").exists()
        if moment == 9:
            command = [sys.executable, runs.__file__, str(folder), driver]
            subprocess.run(command, check=True, timeout=120)
        else:
            assert status(fork(partial(runs.complete, folder, driver))) == 0
        assert (folder / "end").read_text() == (whole / "end").read_text()


def test_a_checkpoint_that_was_half_written_in_place_would_be_lost(
    tmp_path: Path,
) -> None:
    killed_in_the_write(tmp_path, "svi", 3, "half written")
    path = tmp_path / "run.safetensors"
    assert steps_saved(path) == 3
    (partial_file,) = tmp_path.glob(".run.safetensors.*.partial")
    shutil.move(partial_file, path)
    with pytest.raises(ValueError, match="run.safetensors is damaged"):
        resume(path, **runs.fresh("svi"))
