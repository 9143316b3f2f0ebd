"""The benchmark of faults, made short: hostile inputs, kills and rivals for a path."""

import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
KILLS, OTHERS = 5, 1
STRIDES = {"load": 13, "resume": 23}

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
    pytest.mark.filterwarnings("ignore"),  # of processes that fork, and of PEFT
]


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The stored runs, shared by all tests."""
    # Not below pytest's own folder: a user without rights may not enter that one.
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.syspath_prepend(EXAMPLES)
        from benchmarks import fault_trials

        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        yield fault_trials.Bench(Path(home))
        torch.set_default_dtype(before)


def failures(found: list[Any]) -> list[str]:
    from benchmarks import faults

    """What is not as promised, with its inputs and errors."""
    told = {f"{o.function}, {o.kind}: {o.label}": o.told for o in found}
    poor = [f"{o.kind}: {o.told}" for o in found if o.label == "poor error"]
    return [f"{bad} ({told.get(bad, poor)})" for bad in faults.failures(found)]


@pytest.mark.parametrize("function", ["load", "resume"])
def test_hostile_files_are_refused_and_leave_no_trace(
    function: str, bench: Any
) -> None:
    count = 2 * len(kinds(function))
    assert count >= 40
    assert not failures(bench.trials(function, count, 0))


def kinds(function: str) -> list[str]:
    from benchmarks import fault_trials

    return [*fault_trials.KINDS[function].mutations]


@pytest.mark.parametrize("function", ["load", "resume"])
def test_an_entry_that_is_gone_or_of_another_kind_is_refused(
    function: str, bench: Any
) -> None:
    from benchmarks import fault_sweep

    path = bench.original(function, "gates", 1)
    some = [*fault_sweep.changes(function, path)][:: STRIDES[function]]
    found = fault_sweep.sweep(bench, function, "gates", some)
    assert len(found) >= 25
    assert not failures(found)


def test_no_field_and_no_distribution_of_a_stranger_does_harm(bench: Any) -> None:
    from benchmarks import fault_sweep

    them = fault_sweep.strangers(bench.original("load", "gates", 1))
    found = fault_sweep.sweep(bench, "load", "gates", them)
    assert len(found) > 50
    assert not failures(found)


def test_a_sweep_changes_every_key(bench: Any) -> None:
    from benchmarks import fault_mutations, fault_sweep

    path = bench.original("resume", "gates", 1)
    deleted = {
        each.place for each in fault_sweep.changes("resume", path) if each.value is ...
    }
    tree = fault_mutations.read(path, "")
    assert {(key,) for key in tree} <= deleted
    assert {("tensors", key) for key in tree["tensors"]} <= deleted
    assert {("random", "python", 1, 624)} <= deleted


def test_an_export_of_a_hostile_state_is_refused_and_leaves_no_trace(
    bench: Any,
) -> None:
    from benchmarks import fault_exports

    assert not failures(fault_exports.trials(bench, 44, 0))


@pytest.mark.parametrize("function", ["save", "checkpoint", "export"])
def test_a_path_holds_a_whole_version_whatever_happens_beside(
    function: str, bench: Any
) -> None:
    from benchmarks import fault_writes

    found = fault_writes.trials(bench, KILLS, OTHERS, 0, only=[function])
    assert len(found) >= KILLS + 2 * OTHERS
    assert not failures(found)


@pytest.mark.parametrize("function", ["load", "resume"])
def test_an_untouched_file_restores_the_same(function: str, bench: Any) -> None:
    from benchmarks import fault_trials

    for name in bench.names:
        path = bench.original(function, name, 1)
        for steps in (0, 1):
            work = (function, "flipped bit", name, (path, path), steps)
            assert bench.run(lambda work=work: fault_trials.judged(*work)) == (
                "same",
                "",
            )


def death() -> tuple[str, str]:
    os.kill(os.getpid(), signal.SIGKILL)
    return "same", ""


def sleep() -> tuple[str, str]:
    time.sleep(30)
    return "same", ""


def swallow() -> tuple[str, str]:
    return "same", str(len(bytearray(3 << 30)))


@pytest.mark.parametrize(
    ("work", "label"), [(death, "crashed"), (sleep, "hung"), (swallow, "memory")]
)
def test_a_process_that_dies_hangs_or_swells_is_counted(
    work: Callable[[], tuple[str, str]],
    label: str,
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import fault_processes

    monkeypatch.setattr(fault_processes, "SECONDS", 2)
    assert bench.run(work)[0] == label
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def test_code_of_a_stranger_is_counted(bench: Any) -> None:
    def work() -> tuple[str, str]:
        import megatron.stranger  # type: ignore[import-not-found] # noqa: F401

        return "same", ""

    assert bench.run(work)[0] == "code executed"
    assert bench.run(lambda: ("same", ""))[0] == "same"


def unclear(path: Path, net: Any) -> Any:
    raise KeyError(str(path))


def nameless(path: Path, net: Any) -> Any:
    raise ValueError("the file is damaged")


def clear(path: Path, net: Any) -> Any:
    raise ValueError(f"{path} is damaged")


def freezing(path: Path, net: Any) -> Any:
    net.requires_grad_(False)
    clear(path, net)


def drawing(path: Path, net: Any) -> Any:
    torch.rand(())
    clear(path, net)


@pytest.mark.parametrize(
    ("load", "label"),
    [
        (unclear, "poor error"),
        (nameless, "poor error"),
        (clear, "refused"),
        (freezing, "state changed"),
        (drawing, "state changed"),
    ],
)
def test_an_error_is_judged_by_its_words_and_by_what_it_leaves(
    load: Callable[..., Any], label: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = judged_with(load, bench, monkeypatch, "flipped bit")
    assert found[0] == label, found


def judged_with(
    load: Callable[..., Any], bench: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> Any:
    from benchmarks import fault_trials

    path = bench.original("load", "gates", 1)
    fault_trials.expected("load", path, "gates")
    monkeypatch.setattr(fault_trials.lrvd, "load", load)
    work = ("load", kind, "gates", (path, path), 0)
    return bench.run(lambda: fault_trials.judged(*work))


@pytest.mark.parametrize(
    ("number", "kind", "label"),
    [
        (2.0, "flipped bit", "silently wrong"),
        (2.0, "name", "valid"),
        (float("nan"), "name", "silently wrong"),
    ],
)
def test_what_is_accepted_is_judged_by_its_state(
    number: float, kind: str, label: str, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lrvd_pyro

    real = lrvd_pyro.load

    def load(path: Path, net: Any) -> Any:
        model, guide = real(path, net)
        model.space.weights("lora_A")[0].data[0, 0] = number
        return model, guide

    assert judged_with(load, bench, monkeypatch, kind)[0] == label


def test_a_base_that_was_rebuilt_is_silently_wrong(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lrvd_pyro

    real = lrvd_pyro.load

    def load(path: Path, net: Any) -> Any:
        net.deeper = net.norm  # the same parameters once more
        return real(path, net)

    assert judged_with(load, bench, monkeypatch, "name")[0] == "silently wrong"


def test_every_outcome_stands_in_the_table(
    bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks import fault_trials, faults

    found = [fault_trials.Outcome("load", "name", "same", "") for _ in range(7)]
    found += [fault_trials.Outcome("save", "killed", "crashed", "SIGSEGV")]
    monkeypatch.setattr(faults, "outcomes", lambda *numbers, sweeps: found)
    out, log = tmp_path / "faults.md", tmp_path / "log"
    with pytest.raises(SystemExit, match="1 x save, killed: crashed"):
        faults.main(["--out", str(out), "--log", str(log)])
    assert "| load | name | 7 |" in out.read_text()
    assert len(log.read_text().splitlines()) == 8
