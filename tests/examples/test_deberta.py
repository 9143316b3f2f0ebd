"""The README's command for DeBERTa-v3, on a random one of two layers."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from inferred import QUIET
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Tokenizer,
)

import lrvd_pyro as lrvd

pytestmark = QUIET

ROOT = Path(__file__).parents[2]
GOOD, BAD = ["good", "fine", "great", "lovely"], ["bad", "dull", "poor", "awful"]


def options() -> list[str]:
    """What the README gives the quickstart."""
    text = (ROOT / "README.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"python examples/quickstart\.py (.*deberta.*)", text)
    return shlex.split(command, comments=True)


def write_model(folder: Path) -> None:
    """The options of deberta-v3-base in small, and a tokenizer of its kind."""
    words = [f"▁{word}" for word in [*GOOD, *BAD, "film", "book", "song", "the"]]
    pieces = [
        "[PAD]",
        "[CLS]",
        "[SEP]",
        "[UNK]",
        "▁",
        *words,
        *map(chr, range(97, 123)),
    ]
    tokenizer = DebertaV2Tokenizer(vocab=[(piece, -3.0) for piece in pieces])
    tokenizer.save_pretrained(folder)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        relative_attention=True,
        position_buckets=8,
        share_att_key=True,
        pos_att_type="p2c|c2p",
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        max_position_embeddings=64,
        type_vocab_size=0,
    )
    torch.set_default_dtype(torch.float32)
    DebertaV2ForSequenceClassification(config).save_pretrained(folder)


def write_data(file: Path) -> None:
    rows = [
        f"the {word} {noun}\t{label}"
        for label, words in enumerate([BAD, GOOD])
        for word in words
        for noun in ("film", "book", "song")
    ]
    file.write_text("\n".join(["text\tlabel", *rows, ""]))


@pytest.mark.filterwarnings("ignore:.*cannot share passes:UserWarning")
@pytest.mark.filterwarnings("ignore:.*the examples run one at a time:UserWarning")
def test_the_readmes_command_trains_predicts_and_saves_a_deberta(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    quickstart = importlib.import_module("quickstart")
    monkeypatch.setattr(importlib.import_module("quickstart_task"), "PER_LIBRARY", 12)
    folder, data = tmp_path / "model", tmp_path / "reviews.tsv"
    write_model(folder)
    write_data(data)
    given = {
        "microsoft/deberta-v3-base": str(folder),
        "glue:mrpc": str(data),
        "cuda": "cpu",
    }
    command = [given.get(option, option) for option in options()] + ["--draws", "25"]
    assert set(given.values()) <= set(command)
    with pytest.warns(UserWarning, match="query_proj' sees 1 rows.*once per batch"):
        quickstart.main(command)
    printed = capsys.readouterr().out
    assert "LRVD, 8 samples" in printed and "query_proj" in printed
    base = AutoModelForSequenceClassification.from_pretrained(folder)
    model, _ = lrvd.load(tmp_path / "runs/quickstart/adapter", base)
    assert all(weight.any() for weight in model.space.weights("lora_B"))
