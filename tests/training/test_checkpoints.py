"""A run goes on from its checkpoint, and would not without any part of it."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pyro
import pytest
import runs
import torch
from pairs import rank_guide
from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoNormal
from runs import DRIVERS, STEPS
from torch import Tensor, nn

import lrvd_pyro as lrvd
from lrvd_pyro import priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.training import checkpoints
from lrvd_pyro.training import tree_file as packed
from lrvd_pyro.training.checkpoints import checkpoint, resume
from lrvd_pyro.training.sampler import ResumableSampler


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("steps", [0, 1, 4, 5, 7, 9])
def test_resumed_after_any_step_a_run_ends_where_it_would_have(
    steps: int, driver: str, path: Path
) -> None:
    whole = runs.begun(path, driver, steps)
    runs.train(whole, STEPS)
    expected = runs.end(whole)
    resumed = runs.fresh(driver)
    pyro.set_rng_seed(4)
    resume(path, **resumed)
    runs.train(resumed, STEPS)
    assert runs.end(resumed) == expected


def skip(*_: Any) -> None:
    """Restore nothing."""


@pytest.mark.parametrize(
    "part",
    [
        "lrvd_pyro.training.checkpoints.set_random_state",
        "torch.set_rng_state",
        "numpy.random.set_state",
        "random.setstate",
        "lrvd_pyro.training.checkpoints.load_optimizer",
        "lrvd_pyro.RankELBO.load_state_dict",
        "lrvd_pyro.ResumableSampler.load_state_dict",
        "lrvd_pyro.RankSchedule.load_state_dict",
        "torch.Tensor.copy_",
    ],
)
def test_without_any_one_part_it_ends_elsewhere(
    part: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = runs.begun(path, steps=3)
    runs.train(whole, STEPS)
    expected = runs.end(whole)
    resumed = runs.fresh("svi")
    pyro.set_rng_seed(4)
    module, _, name = part.rpartition(".")
    with monkeypatch.context() as patch:
        owner = {
            "lrvd_pyro.training.checkpoints": checkpoints,
            "torch": torch,
            "numpy.random": np.random,
            "random": random,
            "lrvd_pyro.RankELBO": lrvd.RankELBO,
            "lrvd_pyro.ResumableSampler": ResumableSampler,
            "lrvd_pyro.RankSchedule": lrvd.RankSchedule,
            "torch.Tensor": Tensor,
        }[module]
        patch.setattr(owner, name, skip)
        resume(path, **resumed)
    runs.train(resumed, STEPS)
    assert runs.end(resumed) != expected


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_run_can_be_set_back(driver: str, steps: int, path: Path) -> None:
    run = runs.begun(path, driver, steps)
    ends = []
    for _ in range(2):
        runs.train(run, 4)
        ends.append(runs.end(run))
        resume(path, **run)
    assert ends[0] == ends[1]


PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "factor": lambda: diagonal(FactorLoRA(nets.perceptron(), num_data=20)),
    "horseshoe": lambda: diagonal(gate(prior=priors.Horseshoe())),
    "layers": lambda: diagonal(gate(prior=priors.Hierarchical(over="type"))),
    "normalized": lambda: diagonal(gate(nets.lora(Normalized(), **NORMALIZED))),
    "drawn A": lambda: diagonal(gate(runs.frozen(nets.perceptron()))),
    "AutoNormal": lambda: runs.automatic(AutoNormal),
    "AutoLowRank": lambda: runs.automatic(AutoLowRankMultivariateNormal),
}
NORMALIZED: dict[str, Any] = {"target_modules": ["hidden", "out"]}


def gate(net: Any = None, **options: Any) -> GateLoRA:
    return GateLoRA(net or nets.perceptron(), num_data=20, **options)


def diagonal(model: Any) -> tuple[Any, Any]:
    return model, rank_guide(model)


class Normalized(nets.Perceptron):
    """With running statistics, which change in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(self.hidden(x)).tanh())
        return logits


def sgd(model: Any, guide: Any) -> Any:
    groups = lrvd.optim.parameter_groups(model, guide, variational_lr=1e-3)
    return torch.optim.SGD(groups, lr=1e-4, momentum=0.9)


@pytest.mark.filterwarnings("ignore:no closed form")
@pytest.mark.parametrize("make", [lambda *_: lrvd.optim.AdamW(lr=1e-2), sgd])
@pytest.mark.parametrize("name", PAIRS)
def test_every_model_and_guide_goes_on(name: str, make: Any, path: Path) -> None:
    ends = []
    base = None
    for attempt in range(2):
        torch.manual_seed(attempt)
        model, guide = PAIRS[name]()
        known = {k: v.clone() for k, v in model.net.state_dict().items()}
        if base is not None:  # the frozen base is the user's, all else the file's
            kept = {k: v for k, v in base.items() if "lora_" not in k}
            model.net.load_state_dict(known | kept)
        base = base or known
        run = {"model": model, "guide": guide, "optimizer": make(model, guide)}
        # batch normalization mixes examples
        noise: Any = "batch" if name == "normalized" else "auto"
        run |= {"elbo": lrvd.RankELBO(noise=noise), "sampler": ResumableSampler(20)}
        if attempt:
            assert resume(path, **run) == "one"
        run["schedule"] = []
        if not attempt:
            runs.train(run, 2)
            keep = torch.arange(model.space.size) % 4 > 1
            keep[:4] &= name != "layers"  # a module goes
            if isinstance(guide, RankDiagonal):
                lrvd.selection.select(model, guide, run["optimizer"], keep=keep)
            runs.train(run, 3)
            checkpoint(path, **run, extra="one")
        runs.train(run, 6)
        ends.append(runs.end(run) | {"statistics": runs.bits([*model.buffers()])})
    assert ends[0] == ends[1]


def test_extra_and_a_history_come_back(path: Path) -> None:
    run = runs.begun(path)
    history = lrvd.RankHistory(run["guide"])
    history.record(7)
    extra = {
        "best": 0.1,
        1: [None, True, float("inf"), "text"],
        "nested": ({"a": torch.arange(3)}, torch.ones(2, dtype=torch.bfloat16)),
        ("x", 2): torch.tensor(True),
        2: torch.zeros(1),
        "2": torch.zeros(0, 2),
    }
    run["schedule"].append(history)
    checkpoint(path, **run, extra=extra)
    fresh = runs.fresh("svi")
    fresh["schedule"].append(lrvd.RankHistory(fresh["guide"]))
    found = resume(path, **fresh)
    assert repr(found) == repr(extra)
    assert torch.equal(fresh["schedule"][1].log_alpha, history.log_alpha)


def test_nothing_in_the_file_is_pickled(path: Path) -> None:
    runs.begun(path)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header["__metadata__"]["format"] == packed.FORMAT
    last = max(v["data_offsets"][1] for k, v in header.items() if k[:2] != "__")
    assert 8 + size + last == len(content)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_noise_goes_on(path: Path) -> None:
    torch.rand((), device="cuda")
    runs.begun(path)
    drawn = torch.rand(5, device="cuda")
    resume(path, **runs.fresh("svi"))
    assert torch.equal(torch.rand(5, device="cuda"), drawn)


def test_the_scale_of_the_linearized_noise_comes_back(path: Path) -> None:
    run = runs.fresh("svi")
    run["guide"].linearized_scale = 5.0
    checkpoint(path, **run)
    run["guide"].linearized_scale = 3.0
    other = runs.fresh("svi")
    for each in (run, other):
        resume(path, **each)
        assert each["guide"].linearized_scale == 5.0


def test_a_checkpoint_without_that_scale_has_the_noise_of_draws(path: Path) -> None:
    run = runs.fresh("svi")
    checkpoint(path, **run)
    state, _ = packed.read(path)
    del state["linearized_scale"]
    packed.write(path, state)
    run["guide"].linearized_scale = 3.0
    resume(path, **run)
    assert run["guide"].linearized_scale == 1.0
