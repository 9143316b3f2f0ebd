"""The quickstart: its corpus, its data files, and the whole of it, made tiny."""

import importlib
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = "numpy scipy torch sklearn scikit-learn pandas matplotlib sympy np. pd. plt."


@pytest.fixture(autouse=True)
def examples_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Any:
    module = importlib.import_module("quickstart")
    monkeypatch.setattr(module, "PER_LIBRARY", 12)
    monkeypatch.setattr(module, "SENTENCES", 64)
    monkeypatch.setattr(module, "SAMPLES", 3)
    monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(module, "LR", 2e-2)  # so that B leaves zero in ten steps
    return module


def test_corpus_is_disjoint_masked_and_holds_every_label() -> None:
    docstrings = importlib.import_module("docstrings")
    text_data = importlib.import_module("text_data")
    data, held_out = docstrings.corpus(60)
    parts = [part.texts for part in text_data.split(data, 10_000, seed=0)]
    texts = [text.lower() for part in [*parts, held_out] for text in part]
    assert len(texts) == len(set(texts)) == 60 * (len(docstrings.LIBRARIES) + 1)
    assert not [text for text in texts for name in NAMES.split() if is_in(name, text)]
    for part in text_data.split(data, 10_000, seed=0):
        assert set(part.labels) == set(range(len(docstrings.LIBRARIES)))


def is_in(name: str, text: str) -> bool:
    return bool(re.search(rf"\b{re.escape(name)}" if "." in name else name, text))


@pytest.mark.parametrize(
    "text",
    [
        "A NumPy array",
        "see np.where",
        "torch.nn",
        "PyTorch",
        "scikit-learn",
        "to_numpy",
    ],
)
def test_mask_hides_names_in_any_case(text: str) -> None:
    docstrings = importlib.import_module("docstrings")
    masked = docstrings.mask(text)
    assert docstrings.MASK in masked
    assert not [name for name in NAMES.split() if is_in(name, masked.lower())]


def test_mask_leaves_other_words_alone() -> None:
    docstrings = importlib.import_module("docstrings")
    assert docstrings.mask("clasp. A step, and input.") == "clasp. A step, and input."


def test_a_library_that_is_not_installed_is_named() -> None:
    docstrings = importlib.import_module("docstrings")
    with pytest.raises(ModuleNotFoundError, match="no_such_library is not installed"):
        next(docstrings.first_sentences("no_such_library"))


def test_split_keeps_a_repeated_text_once_and_follows_the_seed() -> None:
    text_data = importlib.import_module("text_data")
    data = text_data.Text([f"text {i % 50}" for i in range(100)], [0] * 100)
    first, again, other = (text_data.split(data, 40, seed=s) for s in (0, 0, 1))
    assert [len(part) for part in first] == [24, 6, 10]
    assert len({text for part in first for text in part.texts}) == 40
    assert first == again != other


def test_read_tsv_takes_quote_characters_as_text(tmp_path: Path) -> None:
    text_data = importlib.import_module("text_data")
    file = tmp_path / "quotes.tsv"
    file.write_text('text\tlabel\n"an open quote\t1\nnext\t0\n', encoding="utf-8")
    expected = text_data.Text(['"an open quote', "next"], [1, 0])
    assert text_data.read(str(file)) == expected


def test_read_tsv_names_the_columns_it_found(tmp_path: Path) -> None:
    text_data = importlib.import_module("text_data")
    file = tmp_path / "columns.tsv"
    file.write_text("sentence\tlabel\nfine\t1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"\['sentence', 'label'\]; expected text"):
        text_data.read_tsv(file)


def test_both_start_from_the_same_network(quickstart: Any) -> None:
    args = quickstart.options().parse_args(["--seed", "3"])
    task = quickstart.load_task(args)
    first, again = (quickstart.lora_network(task, args) for _ in range(2))
    trained = [name for name, p in first.named_parameters() if p.requires_grad]
    assert trained and all(
        torch.equal(first.get_parameter(name), again.get_parameter(name))
        for name in trained
    )
    assert not [m for m in first.modules() if getattr(m, "p", 0.0) != 0.0]


def test_default_run_prints_finite_scores_and_ranks(
    quickstart: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    quickstart.main(["--epochs", "1", "--r", "4"])
    out = capsys.readouterr().out
    _, mean, sampled, *_, uncertainty = check_report(out, r=4)
    assert mean[-8:-3] != sampled[-8:-3], "the samples are as good as the mean"
    assert 0 < uncertainty[-3] < uncertainty[-6], "mutual information below entropy"
    assert "held-out library sympy" in out


def test_run_on_a_file(
    quickstart: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "reviews.tsv"
    lines = [f'{"good" if i % 2 else "bad"} "film {i}\t{i % 2}\n' for i in range(48)]
    file.write_text("text\tlabel\n" + "".join(lines), encoding="utf-8")
    quickstart.main(["--data", str(file), "--epochs", "1", "--targets", "value"])
    out = capsys.readouterr().out
    assert out.startswith("28 sentences to train on, 8 dev, 12 test")
    check_report(out, r=8, types=1)


def check_report(out: str, r: int, types: int = 2) -> list[list[float]]:
    """Three rows of finite scores, a picture that adds up, three of uncertainty."""
    rows = [
        line.split() for line in out.splitlines() if re.match(" *(LoRA|LRVD)", line)
    ]
    assert len(rows) == 6
    figures = [
        [float(f) for f in row if re.fullmatch(r"-?[\d.]+|nan|inf", f)] for row in rows
    ]
    assert all(math.isfinite(f) for row in figures for f in row)
    lora, mean, sampled = (row[-8:] for row in figures[:3])
    for dev_nll, accuracy, nll, brier, ece, _, rank, seconds in (lora, mean, sampled):
        assert dev_nll > 0 and nll > 0 and seconds > 0
        assert 0 <= accuracy <= 1 and 0 <= brier <= 2 and 0 <= ece <= 1
        assert 0 < rank <= 6 * types * r
    assert lora[-2] == 6 * types * r
    assert mean[-3] == lora[-3] + lora[-2], "one variance per rank component"
    kept = [float(k) for k in re.findall(r"[█·]{8} +([\d.]+)", out)]
    assert len(kept) == 6 * types and all(0 <= k <= r for k in kept)
    assert sum(kept) == pytest.approx(sampled[-2], abs=0.05 * len(kept))
    lora, mean, sampled = (row[-6:] for row in figures[3:])
    assert lora[3:] == mean[3:] == [0.0, 0.0, 0.5], "a point has no mutual information"
    assert all(0 <= row[2] <= 1 for row in (lora, mean, sampled))
    return figures
