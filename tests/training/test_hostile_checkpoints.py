"""A checkpoint with one wrong entry, its hash right: refused, with nothing changed."""

import math
import random
from pathlib import Path
from typing import Any

import damaged
import numpy as np
import pytest
import runs
import torch

import lrvd_pyro as lrvd
from lrvd_pyro.training import tree_file
from lrvd_pyro.training.checkpoints import checkpoint, resume


def outcome(path: Path, run: runs.Run) -> str:
    """What became of it: a refusal that changes nothing, or a run that goes on."""
    before = runs.everything(run)
    try:
        resume(path, **run)
    except (ValueError, TypeError) as error:
        assert runs.everything(run) == before, f"changed by {error}"
        told = [str(error), *getattr(error, "__notes__", [])]
        assert any(str(path) in words for words in told), error
        return "refused"
    runs.train(run, run["elbo"].step + 1)
    tensors = [*run["model"].parameters(), *run["guide"].parameters()]
    assert all(bool(t.isfinite().all()) for t in tensors)
    return "valid"


@pytest.mark.parametrize("driver", runs.DRIVERS)
def test_every_entry_is_checked_and_a_refusal_changes_nothing(
    driver: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, driver, steps=7)  # pruned at step 5
    tree, _ = tree_file.read(path)
    tree["random"]["numpy"] = None  # long, and below
    whole, _ = tree_file.read(path)
    outcomes: dict[str, list[str]] = {"refused": [], "valid": []}
    run = runs.started(driver)
    for what, wrong in damaged.damaged(tree):
        if what.startswith("('random', 'numpy')"):
            continue
        if isinstance(wrong.get("random"), dict) and "numpy" in wrong["random"]:
            wrong = damaged.edited(wrong, ("random", "numpy"), whole["random"]["numpy"])
        tree_file.write(path, wrong)
        found = outcome(path, run)
        outcomes[found].append(what)
        if found == "valid":
            run = runs.started(driver)
    assert len(outcomes["refused"]) > 300, outcomes["valid"]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("numpy", 2), -(10**6)),
        (("numpy", 2), 10**6),
        (("numpy", 1), [1, 2]),
        (("numpy", 4), math.nan),
        (("numpy", 0), 7),
        (("python", 1), (1, 2)),
        (("torch",), torch.zeros(5000, dtype=torch.uint8)),
        (("cuda",), [torch.zeros(3)]),
    ],
)
def test_the_states_of_generators_are_tried_before_they_are_used(
    place: Any, value: Any, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=1)
    tree, _ = tree_file.read(path)
    tree_file.write(path, damaged.edited(tree, ("random", *place), value))
    run = runs.started("svi")
    before = runs.everything(run)
    with pytest.raises(ValueError, match=r"run.safetensors: random\['"):
        resume(path, **run)
    assert runs.everything(run) == before


def test_moments_of_another_shape_are_refused(tmp_path: Path) -> None:
    """They would make a fused step write beyond its memory."""
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=1)
    tree, _ = tree_file.read(path)
    moments = tree["optimizer"]["moments"]
    name = next(n for n in moments if "lora" in n)
    for tensor in (torch.zeros(0), torch.zeros(2, 3), torch.zeros(10**6)):
        moments[name]["exp_avg"] = tensor
        tree_file.write(path, tree)
        run = runs.started("svi")
        with pytest.raises(
            ValueError, match=r"moments\['.*'exp_avg'\] is .*; expected"
        ):
            resume(path, **run)


class Own:
    """A user's schedule, which may raise when all the rest is restored."""

    def state_dict(self) -> dict[str, Any]:
        return {"draws": [random.random(), np.random.rand(), torch.rand(()).item()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        random.random(), np.random.rand(), torch.rand(())
        raise KeyError("mine")


@pytest.mark.parametrize("steps", [2, 7])
def test_a_users_own_error_leaves_the_run_as_it_was(steps: int, tmp_path: Path) -> None:
    """After 7 steps the run of the file is pruned, and this one is not."""
    path = tmp_path / "run.safetensors"
    run = runs.begun(path, steps=steps)
    run["schedule"] += [Own()]
    checkpoint(path, **run)
    new = runs.started("svi")
    new["schedule"] += [Own()]
    schedules = new["schedule"]
    before = runs.everything(new | {"schedule": schedules[:-1]})
    with pytest.raises(KeyError, match="mine") as told:
        resume(path, **new)
    assert f"while reading or writing {path}" in told.value.__notes__
    assert runs.everything(new | {"schedule": schedules[:-1]}) == before
    runs.train(new | {"schedule": schedules[:-1]}, 3)
    found = lrvd.predict(new["model"], new["guide"], [{"x": runs.data()[0]}], 2)
    assert found.probs.isfinite().all()


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("schedule",), (), r"schedule is \(\); expected the states of 1 schedules"),
        (("layout", "guide.log_variance"), 3, "is 3; expected a dtype, a shape and wh"),
        (("tensors", "more"), torch.ones(1), r"a layout that differ in \['more'\]"),
        (
            ("tensors", "guide.log_variance"),
            3,
            "variance is 3; expected one of torch",
        ),
        (
            ("tensors", "guide.log_variance"),
            torch.full((8,), math.nan, dtype=torch.float64),
            r"\[8\]; it has NaN or infinity, expected finite",
        ),
        (
            ("optimizer", "groups"),
            ({"params": []},),
            r"groups is .*; expected 3",
        ),
        (
            ("optimizer", "groups", 0, "params"),
            ["model.x"],
            r"params is \['model.x'\]; expected names of what the model has",
        ),
        (
            ("optimizer", "groups", 2, "params"),
            ["guide.log_variance"] * 2,
            "params is .*; expected each parameter once",
        ),
        (
            ("optimizer", "groups", 0, "fused"),
            "x",
            r"groups\[0\]\['fused'\] is 'x'; expected true or false",
        ),
        (("ranks", "origin"), (0, 0), r"origin is \(0, 0\); expected 8 different nu"),
        (
            ("optimizer", "groups", 0, "lr"),
            -1.0,
            r"groups\[0\]\['lr'\] is -1.0; expected a rate in its range",
        ),
        (
            ("optimizer", "moments", "model.x"),
            {},
            "moments is .*; expected an entry for each parameter in the groups",
        ),
        (
            ("optimizer", "moments", "guide.log_variance"),
            {"exp_avg": torch.ones(8)},
            r"is \['exp_avg'\]; expected \['exp_avg', 'exp_avg_sq', 'step'\]",
        ),
        (
            ("optimizer", "moments", "guide.log_variance", "exp_avg"),
            torch.full((8,), math.nan),
            r"'exp_avg'\] is a tensor .*; expected finite numbers",
        ),
        (
            ("optimizer", "moments", "guide.log_variance", "exp_avg_sq"),
            torch.full((8,), -1.0),
            r"'exp_avg_sq'\] is 'negative somewhere'; expected numbers from 0 on",
        ),
        (("kinds", "model"), 3, r"kinds\['model'\] is 3; expected a list"),
    ],
)
def test_a_wrong_entry_is_named(
    place: Any, value: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=1)
    tree, _ = tree_file.read(path)
    tree_file.write(path, damaged.edited(tree, place, value))
    run = runs.started("svi")
    with pytest.raises(ValueError, match=f"run.safetensors.*{message}"):
        resume(path, **run)


def test_a_history_with_ranks_that_are_gone_is_resumed(tmp_path: Path) -> None:
    """Their log alpha is NaN."""
    path = tmp_path / "run.safetensors"
    run = runs.fresh("svi")
    run["schedule"] += [lrvd.RankHistory(run["guide"])]
    history = run["schedule"][-1]
    history.record(0)
    runs.train(run | {"schedule": run["schedule"][:-1]}, 7)
    history.record(7)
    assert history.log_alpha.isnan().any()
    checkpoint(path, **run)
    new = runs.started("svi")
    new["schedule"] += [lrvd.RankHistory(new["guide"])]
    resume(path, **new)
    found = new["schedule"][-1].log_alpha
    torch.testing.assert_close(found, history.log_alpha, equal_nan=True)
