"""What checkpoint and resume refuse: by name, and with nothing half restored."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pyro
import pytest
import runs
import torch
from pyro.infer.autoguide import AutoNormal
from runs import Run
from safetensors.torch import save_file

import lrvd_pyro as lrvd
from lrvd_pyro.training import tree_file as packed
from lrvd_pyro.training.checkpoints import checkpoint, resume
from lrvd_pyro.training.sampler import ResumableSampler


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.safetensors"


def refused(path: Path, run: Run, error: type[Exception], message: str) -> None:
    """Resuming raises, and changes nothing."""
    before = runs.everything(run)
    with pytest.raises(error, match=message):
        resume(path, **run)
    assert runs.everything(run) == before


def trained(net: Any) -> Any:
    """The bias of the last layer trains too."""
    net.base_model.model.out.base_layer.bias.requires_grad_(True)
    return net


def moved(net: Any) -> Any:
    """On another base of the same shape."""
    net.base_model.model.out.base_layer.weight.data += 1e-3
    return net


def test_a_missing_file_is_named(path: Path) -> None:
    run = runs.fresh("svi")
    runs.train(run, 1)
    refused(path, run, FileNotFoundError, r"no checkpoint at .*run.*if path.exists\(\)")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file_is_damaged(share: float, path: Path) -> None:
    runs.begun(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    run = runs.fresh("svi")
    runs.train(run, 1)
    refused(path, run, ValueError, "run.safetensors is damaged: .*resume an earlier")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "is another safetensors file; expected one that checkpoint"),
        ({"format": packed.FORMAT, "version": "9"}, "version 9; this .* up to 3: pip"),
        ({"format": packed.FORMAT, "version": "3"}, "is damaged: 'hash'"),
    ],
)
def test_other_contents_are_refused(header: Any, message: str, path: Path) -> None:
    save_file({"x": torch.ones(1)}, path, metadata=header)
    run = runs.fresh("svi")
    runs.train(run, 1)
    refused(path, run, ValueError, message)


OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "head": (
        lambda: trained(nets.perceptron()),
        r"does not fit .*base_layer.bias None, here \('torch.float64', \(3,\), True\)",
    ),
    "base": (
        lambda: moved(nets.perceptron()),
        r"on another base: out.weight has the values .*\. Make net .*from_pretrained",
    ),
    "rank": (
        lambda: nets.perceptron(r=2),
        r"other rank components .*: out 3, here 2; hidden 0, here 2\. Make net, prior",
    ),
    "modules": (
        lambda: nets.lora(nets.Perceptron(), target_modules=["hidden"]),
        "other rank components .*: .*out 3, here 0",
    ),
    "width": (
        lambda: nets.lora(nets.Perceptron(hidden=7), target_modules=["hidden", "out"]),
        r"does not fit .*lora_A.default.weight .*\(3, 6\).*, here .*\(3, 7\)",
    ),
    "type": (
        lambda: nets.perceptron().float(),
        r"does not fit .*'torch.float64'.*, here \('torch.float32'",
    ),
    "frozen": (
        lambda: runs.frozen(nets.perceptron()),
        r"does not fit .*\(3, 6\), True\), here .*\(3, 6\), False\)",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_models_checkpoint_is_refused(other: str, path: Path) -> None:
    runs.begun(path)
    net, message = OTHERS[other]
    torch.manual_seed(0)
    run = runs.fresh("svi", net())
    if other != "type":
        runs.train(run, 1)
    refused(path, run, ValueError, message)


def test_a_run_cannot_be_set_back_past_a_pruning(path: Path) -> None:
    run = runs.begun(path, steps=4)
    runs.train(run, 6)
    refused(
        path,
        run,
        ValueError,
        "other rank components .*: hidden 4, here 0; out 4, here 3",
    )


OBJECTS: dict[str, tuple[Callable[[Run], Any], str]] = {
    "no sampler": (
        lambda run: run | {"sampler": None},
        "with sampler=lrvd_pyro.ResumableSampler and .* given sampler=None; pass",
    ),
    "no schedule": (
        lambda run: run | {"schedule": []},
        "with schedule=lrvd_pyro.RankSchedule and resume was given schedule=None",
    ),
    "optimizer": (
        lambda run: run | {"optimizer": runs.fresh("torch")["optimizer"]},
        "with optimizer=lrvd_pyro.AdamW and .*optimizer=torch.AdamW",
    ),
    "guide": (
        lambda run: run | {"guide": runs.set_up(AutoNormal(run["model"]))},
        "with guide=lrvd_pyro.RankDiagonal and .*guide=pyro.AutoNormal",
    ),
    "order": (
        lambda run: run | {"sampler": ResumableSampler(20, seed=2)},
        r"has n=20, seed=1 and this one n=20, seed=2, .*ResumableSampler\(20, seed=1\)",
    ),
}


@pytest.mark.parametrize("change", OBJECTS)
def test_other_objects_are_refused(change: str, path: Path) -> None:
    runs.begun(path)
    given, message = OBJECTS[change]
    run = runs.fresh("svi")
    runs.train(run, 1)
    other = given(run)
    before = runs.everything(run)
    with pytest.raises(ValueError, match=message):
        resume(path, **other)
    assert runs.everything(run) == before


def test_an_object_that_was_not_saved_is_refused(path: Path) -> None:
    run = runs.begun(path)
    checkpoint(path, **run | {"sampler": None})
    message = "sampler=None and resume was given sampler=lrvd_pyro.ResumableSampler;"
    fresh = runs.fresh("svi")
    runs.train(fresh, 1)
    refused(path, fresh, ValueError, message)


def test_groups_of_other_parameters_are_refused(path: Path) -> None:
    runs.begun(path, "torch")
    run = runs.fresh("torch")
    runs.train(run, 1)
    run["optimizer"].param_groups[0]["params"].pop()
    message = r"groups of \[2, 0, 2\] parameters, this one has groups of \[1, 0, 2\]"
    refused(path, run, ValueError, message)


def test_a_merged_adapter_cannot_be_pruned(path: Path) -> None:
    runs.begun(path)
    run = runs.fresh("svi")
    runs.train(run, 1)
    run["model"].base_net.merge_adapter()
    refused(path, run, RuntimeError, "merged")


def pending(run: Run) -> Any:
    optimizer = lrvd.optim.AdamW()
    optimizer.set_state(run["optimizer"].get_state())
    return optimizer


UNFIT: dict[str, tuple[Callable[[Run], Any], type[Exception], str]] = {
    "function": (
        lambda run: {"guide": lambda **_: None},
        TypeError,
        "guide is a function without parameters .*RankDiagonal",
    ),
    "lazy guide": (
        lambda run: {"guide": AutoNormal(run["model"])},
        ValueError,
        r"AutoNormal makes its parameters .*guide\(\*\*batch\) once before",
    ),
    "elbo": (
        lambda run: {"elbo": run["elbo"](run["model"], run["guide"])},
        TypeError,
        "elbo is a ELBOModule; expected the RankELBO itself",
    ),
    "sampler": (
        lambda run: {"sampler": range(3)},
        TypeError,
        "sampler is a range without state_dict .*ResumableSampler",
    ),
    "Pyro's": (
        lambda run: {"optimizer": pyro.optim.ClippedAdam({})},
        TypeError,
        "optimizer is a PyroOptim; checkpoints take lrvd_pyro.optim.AdamW",
    ),
    "foreign": (
        lambda run: {"optimizer": torch.optim.SGD([torch.ones(2, 3)])},
        ValueError,
        r"parameters of shapes \(2, 3\) that neither model nor guide has",
    ),
    "pending": (
        lambda run: {"optimizer": pending(run)},
        ValueError,
        "was restored by set_state and has taken no step since",
    ),
    "extra": (
        lambda run: {"extra": {"a": [1, {2}]}},
        TypeError,
        r"extra/a/1 is a set; a checkpoint holds .*convert it",
    ),
    "folder": (
        lambda run: {"path": "."},
        ValueError,
        r"is a folder; give the path of a file: checkpoint\(",
    ),
}


@pytest.mark.parametrize("what", UNFIT)
def test_what_cannot_be_stored_is_named(what: str, path: Path) -> None:
    run = runs.begun(path, steps=1)
    whole = path.read_bytes()
    change, error, message = UNFIT[what]
    with pytest.raises(error, match=message):
        checkpoint(**{"path": path, **run, **change(run)})
    assert path.read_bytes() == whole


def test_a_write_that_fails_leaves_the_previous_checkpoint_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.begun(path, steps=1)
    whole = path.read_bytes()

    def full(partial: Path, content: bytes) -> None:
        partial.write_text("some")
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint(path, **run)
    assert path.read_bytes() == whole and [*path.parent.iterdir()] == [path]
