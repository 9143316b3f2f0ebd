"""Runs under any optimizer and schedule of torch, or one's own, go on bit for bit."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import runs
import torch
from torch import optim
from torch.optim import lr_scheduler as schedules

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.training.checkpoints import checkpoint, resume

Make = Callable[..., Any]


class Factored(optim.Optimizer):
    """A user's optimizer: an integer count, and a moment of another shape."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-2})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            assert p.numel() > 1, "no single numbers"
            state = self.state[p]
            count = state.setdefault("step", torch.tensor(0))
            row = state.setdefault("row", torch.zeros(len(p)))
            if p.grad is not None:
                count += 1
                row += p.grad.reshape(len(p), -1).mean(1)
                p -= 1e-3 * (row + count).reshape(-1, *[1] * (p.dim() - 1))


def only_first(weights: Any, **options: Any) -> Any:
    """Momentum in one of two groups."""
    return optim.SGD(
        [{"params": weights[:1], **options}, {"params": weights[1:]}], lr=1e-3
    )


OPTIMIZERS: dict[str, Make] = {
    **{
        name: getattr(optim, name)
        for name in ("Adam", "SGD", "RMSprop", "Adagrad", "Adafactor", "NAdam", "ASGD")
    },
    "momentum in one group": lambda w: only_first(w, momentum=0.9),
    "amsgrad": lambda w: optim.Adam(w, amsgrad=True),
    "rate as a tensor": lambda w: optim.AdamW(w, lr=torch.tensor(1e-3)),
    "whole rate": lambda w: optim.SGD(w, lr=1),
    "one's own": Factored,
}

SCHEDULES: dict[str, tuple[Make, Make]] = {
    "halves of a whole rate": (
        lambda w: optim.SGD(w, lr=1),
        lambda o: schedules.StepLR(o, 1, gamma=0.01),
    ),
    "warm restarts": (
        optim.AdamW,
        lambda o: schedules.CosineAnnealingWarmRestarts(o, 3),
    ),
    "one cycle": (optim.AdamW, lambda o: schedules.OneCycleLR(o, 0.1, total_steps=20)),
    "in turn": (
        optim.AdamW,
        lambda o: schedules.SequentialLR(
            o, [schedules.ConstantLR(o), schedules.ExponentialLR(o, 0.9)], [2]
        ),
    ),
    "milestones": (optim.AdamW, lambda o: schedules.MultiStepLR(o, [2, 2, 4])),
    "a factor that remembers": (
        optim.AdamW,
        lambda o: schedules.LambdaLR(o, Remembering()),
    ),
}


class Remembering:
    """A factor of the rate that grows a list."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, step: int) -> float:
        self.seen.append(step)
        return 0.5**step


def fresh(make: Make, schedule: Make | None = None) -> runs.Run:
    torch.manual_seed(0)
    model = GateLoRA(nets.perceptron(), prior=lrvd.priors.ARD(), num_data=20)
    guide = RankDiagonal(model)
    weights = [p for p in [*model.parameters(), *guide.parameters()] if p.requires_grad]
    optimizer = make(weights)
    run = {"model": model, "guide": guide, "optimizer": optimizer}
    run["elbo"] = lrvd.RankELBO()
    return run | {"schedule": [schedule(optimizer)] if schedule else []}


def train(run: runs.Run, steps: int) -> str:
    x, labels = runs.data()
    for _ in range(steps):
        run["elbo"](run["model"], run["guide"])(x=x, labels=labels).backward()
        run["optimizer"].step()
        run["optimizer"].zero_grad()
        for each in run["schedule"]:
            each.step()
    return runs.bits([*run["model"].parameters(), *run["guide"].parameters()])


def goes_on(path: Path, make: Make, schedule: Make | None = None) -> None:
    run = fresh(make, schedule)
    train(run, 3)
    checkpoint(path, **run)
    end = train(run, 2)
    again = fresh(make, schedule)
    for _ in range(2):  # the second time from a later moment of the same run
        resume(path, **again)
        assert train(again, 2) == end


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_under_any_optimizer(name: str, tmp_path: Path) -> None:
    goes_on(tmp_path / "run.safetensors", OPTIMIZERS[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_goes_on_under_any_schedule(name: str, tmp_path: Path) -> None:
    goes_on(tmp_path / "run.safetensors", *SCHEDULES[name])


def test_a_schedule_may_be_made_after_resuming(tmp_path: Path) -> None:
    path, run = tmp_path / "run.safetensors", fresh(optim.AdamW)
    schedules.StepLR(run["optimizer"], 1)
    train(run, 3)
    checkpoint(path, **run)
    end, again = train(run, 2), fresh(optim.AdamW)
    resume(path, **again)
    schedules.StepLR(again["optimizer"], 1)
    assert train(again, 2) == end


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_moments_that_are_not_finite_do_not_replace_a_checkpoint(
    value: float, tmp_path: Path
) -> None:
    path, run = tmp_path / "run.safetensors", fresh(optim.AdamW)
    train(run, 2)
    checkpoint(path, **run)
    run["optimizer"].state[run["guide"].log_variance]["exp_avg_sq"][0] = value
    with pytest.raises(ValueError, match="'exp_avg_sq'.*expected finite numbers"):
        checkpoint(path, **run)
    resume(path, **fresh(optim.AdamW))
