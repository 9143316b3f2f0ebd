"""A checkpoint with one wrong entry, its hash right: refused, with nothing changed."""

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import damaged
import numpy as np
import pytest
import runs
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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
    run = started(driver)
    for what, wrong in damaged.damaged(tree):
        if what.startswith("('random', 'numpy')"):
            continue
        if isinstance(wrong.get("random"), dict) and "numpy" in wrong["random"]:
            wrong = damaged.edited(wrong, ("random", "numpy"), whole["random"]["numpy"])
        tree_file.write(path, wrong)
        found = outcome(path, run)
        outcomes[found].append(what)
        if found == "valid":
            run = started(driver)
    assert len(outcomes["refused"]) > 300, outcomes["valid"]


def started(driver: str) -> runs.Run:
    run = runs.fresh(driver)
    runs.train(run, 1)
    return run


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
    run = started("svi")
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
        run = started("svi")
        with pytest.raises(
            ValueError, match=r"moments\['.*'exp_avg'\] is .*; expected"
        ):
            resume(path, **run)


def test_a_flipped_bit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=2)
    whole = path.read_bytes()
    run = started("svi")
    before = runs.everything(run)
    for i in range(40):
        place = len(whole) * i // 40
        flipped = bytes([whole[place] ^ (1 << i % 8)])
        path.write_bytes(whole[:place] + flipped + whole[place + 1 :])
        with pytest.raises(ValueError, match="run.safetensors (is|has)"):
            resume(path, **run)
    assert runs.everything(run) == before


def test_a_checkpoint_of_an_earlier_version_loads_with_one_warning(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=2)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    del header["hash"]
    save_file(load_file(path), path, metadata=header | {"version": "2"})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        resume(path, **started("svi"))
    assert [str(w.message).count("without a hash of its content") for w in seen] == [1]


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
    new = started("svi")
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


def test_a_deep_header_is_damage_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    runs.begun(path, steps=1)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    header["content"] = "[" * 100_000
    save_file(load_file(path), path, metadata=header | {"hash": "0"})
    with pytest.raises(ValueError, match="is damaged"):
        resume(path, **started("svi"))
    header["content"] = json.dumps({"dict": 3})
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(ValueError, match="is damaged"):
        resume(path, **started("svi"))


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
    run = started("svi")
    with pytest.raises(ValueError, match=f"run.safetensors.*{message}"):
        resume(path, **run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff" * 20, "it has 20 bytes and a header of"),
        (b"\x04" + bytes(7) + b"nope", "its header is no JSON"),
        (
            b"\x1d" + bytes(7) + b'{"__metadata__":{"format":1}}',
            "its header's metadata are no texts",
        ),
    ],
)
def test_bytes_that_are_no_checkpoint_are_named(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"is damaged: {message}"):
        resume(path, **started("svi"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": 2}', r"a node has the names \['a', 'b'\], and not one"),
        ('{"dict": [3]}', "a node 'dict' is not as written"),
        ('{"other": []}', "a node 'other' is not as written"),
    ],
)
def test_nodes_that_are_none_are_named(
    content: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.safetensors"
    header = {"format": tree_file.FORMAT, "version": "2", "content": content}
    save_file({"x": torch.ones(1)}, path, metadata=header)
    with pytest.warns(UserWarning, match="without a hash"):
        with pytest.raises(ValueError, match=f"is damaged: {message}"):
            resume(path, **started("svi"))


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
    new = started("svi")
    new["schedule"] += [lrvd.RankHistory(new["guide"])]
    resume(path, **new)
    found = new["schedule"][-1].log_alpha
    torch.testing.assert_close(found, history.log_alpha, equal_nan=True)


@pytest.mark.parametrize("entry", ["steps", "columns", "log_alpha"])
def test_a_history_of_other_sizes_is_refused(entry: str) -> None:
    guide = runs.fresh("svi")["guide"]
    history = lrvd.RankHistory(guide)
    history.record(0)
    history.record(1)
    state = history.state_dict()
    state[entry] = state[entry][:-1]
    with pytest.raises(ValueError, match="steps, .* components and log alpha of"):
        lrvd.RankHistory(guide).load_state_dict(state)


@pytest.mark.parametrize("entry", ["steps", "log_alpha"])
def test_a_history_that_cannot_have_been_is_refused(entry: str) -> None:
    guide = runs.fresh("svi")["guide"]
    history = lrvd.RankHistory(guide)
    history.record(0)
    state = history.state_dict()
    state[entry] = ["x"] if entry == "steps" else state[entry] * math.nan
    with pytest.raises(ValueError, match="expected whole numbers, and NaN of ranks"):
        lrvd.RankHistory(guide).load_state_dict(state)
