"""What has NaN or infinity is not written, and an earlier version stays."""

import math
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from stored import saved

from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import save
from lrvd_pyro.training.checkpoints import checkpoint, resume

BROKEN = ["lora_B", "log_variance"]


def broken(model: Any, guide: Any, which: str) -> None:
    """One number of one tensor of the pair."""
    named = [*model.named_parameters(), *guide.named_parameters()]
    tensor = next(p for name, p in named if which in name)
    with torch.no_grad():
        tensor.view(-1)[-1] = math.nan if which == "lora_B" else math.inf


@pytest.mark.parametrize("which", BROKEN)
def test_a_diverged_pair_does_not_replace_a_saved_one(
    which: str, tmp_path: Path
) -> None:
    path, model, guide = saved(tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    broken(model, guide, which)
    with pytest.raises(ValueError, match=rf"{which}.*: NaN or infinity; .*load\(path"):
        save(path, model, guide)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


@pytest.mark.parametrize("which", BROKEN)
def test_a_diverged_run_does_not_replace_its_last_checkpoint(
    which: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    run = runs.begun(path, steps=2)
    broken(run["model"], run["guide"], which)
    with pytest.raises(ValueError, match=rf"{which}.*: NaN or infinity; .*resume\(pa"):
        checkpoint(path, **run)
    resume(path, **run)
    assert all(p.isfinite().all() for p in run["model"].parameters())


@pytest.mark.parametrize("mode", ["pruned", "padded", "merged"])
def test_a_diverged_adapter_is_not_exported(mode: Any, tmp_path: Path) -> None:
    _, model, guide = saved(tmp_path)
    broken(model, guide, "lora_B")
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="NaN or infinity; expected finite numbers"):
        export_peft(tmp_path / "out", model, guide, mode=mode)
    assert not (tmp_path / "out").exists()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_probe_that_does_not_fit_tells_the_path(tmp_path: Path) -> None:
    _, model, guide = saved(tmp_path)
    with pytest.raises(ValueError) as told:
        export_peft(tmp_path / "out", model, guide, probe={"nothing": torch.ones(2)})
    assert f"while reading or writing {tmp_path / 'out'}" in told.value.__notes__


@pytest.mark.parametrize("mode", ["pruned", "merged"])
def test_an_infinite_scaling_is_not_exported(mode: Any, tmp_path: Path) -> None:
    _, model, guide = saved(tmp_path)
    model.space.layers[0].scaling["default"] = math.inf
    with pytest.raises(ValueError, match="NaN or infinity; expected finite numbers"):
        export_peft(tmp_path / "out", model, guide, mode=mode)
