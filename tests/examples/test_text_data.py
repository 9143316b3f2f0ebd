"""The examples' data files and data sets, read from folders and without a network."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value

EXAMPLES = Path(__file__).parents[2] / "examples"
SPLITS = ("train", "validation", "test")
Rows = list[dict[str, Any]]


@pytest.fixture
def text_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, with the cache of ``datasets`` in a folder of the test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return importlib.import_module("text_data")


def rows_of(part: str) -> Rows:
    return [{"text": f'{part} {i}, a "film"', "label": i % 2} for i in range(20)]


def write_json(rows: Rows, file: Path) -> None:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


WRITERS: dict[str, Callable[[Rows, Path], Any]] = {
    "csv": lambda rows, file: Dataset.from_list(rows).to_csv(file),
    "jsonl": write_json,
    "parquet": lambda rows, file: Dataset.from_list(rows).to_parquet(file),
}


@pytest.mark.parametrize("ending", WRITERS)
def test_of_a_folder_the_training_split_alone_is_read(
    text_data: Any, tmp_path: Path, ending: str
) -> None:
    for part in SPLITS:
        WRITERS[ending](rows_of(part), tmp_path / f"{part}.{ending}")
    data = text_data.read(str(tmp_path))
    assert data.texts == [row["text"] for row in rows_of("train")]
    assert data.labels == [0, 1] * 10
    assert {type(label) for label in data.labels} == {int}


def test_what_is_read_falls_into_disjoint_parts_also_if_it_repeats_itself(
    text_data: Any, tmp_path: Path
) -> None:
    WRITERS["csv"](rows_of("train") * 2, tmp_path / "train.csv")
    data = text_data.read(str(tmp_path))
    parts = text_data.split(data, len(data), seed=0)
    assert len(data) == 40
    assert [len(part) for part in parts] == [12, 3, 5]
    assert {text for part in parts for text in part.texts} == set(data.texts)
    for text, label in zip(parts[2].texts, parts[2].labels):
        assert {"text": text, "label": label} in rows_of("train")


GLUE = {  # the columns of text as GLUE orders them
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "qnli": ["question", "sentence"],
}


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    """Data sets laid out as ``glue`` on the hub: configs, class names, an ``idx``."""
    folder = tmp_path / "glue"
    card = ["---", "configs:"]
    for config, columns in GLUE.items():
        card += [f"- config_name: {config}", "  data_files:"]
        (folder / config).mkdir(parents=True)
        kinds = {column: Value("string") for column in columns}
        kinds |= {"label": ClassLabel(names=["no", "yes"]), "idx": Value("int32")}
        for part in SPLITS:
            card += [f"  - split: {part}", f"    path: {config}/{part}-*"]
            texts = {c: [f"{config} {part} {c} {i}" for i in range(3)] for c in columns}
            table = texts | {"label": [1, 0, 1], "idx": [0, 1, 2]}
            file = folder / config / f"{part}-00000-of-00001.parquet"
            Dataset.from_dict(table, features=Features(kinds)).to_parquet(file)
    (folder / "README.md").write_text("\n".join([*card, "---"]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("config", GLUE)
def test_of_glue_the_first_column_of_strings_and_the_class_indices_are_read(
    text_data: Any, glue: Path, config: str
) -> None:
    texts = [f"{config} train {GLUE[config][0]} {i}" for i in range(3)]
    assert text_data.read(f"{glue}:{config}") == text_data.Text(texts, [1, 0, 1])


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_labels_are_integers_of_any_width(
    text_data: Any, tmp_path: Path, kind: str
) -> None:
    features = Features({"text": Value("large_string"), "label": Value(kind)})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    assert text_data.read(str(tmp_path)) == text_data.Text(["a", "b"], [1, 0])


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"text": "a", "label": "yes"}], "'label': 'string'"),
        ([{"text": "a", "label": 0.5}], "'label': 'float64'"),
        ([{"text": "a", "class": 1}], "'class': 'int64'"),
        ([{"size": 2, "label": 1}], "'size': 'int64', 'label'"),
        ([{"text": ["a", "b"], "label": 1}], "'text': '', 'label'"),
    ],
)
def test_a_data_set_without_text_or_integer_labels_is_refused_with_its_columns(
    text_data: Any, tmp_path: Path, rows: Rows, found: str
) -> None:
    write_json(rows, tmp_path / "train.jsonl")
    expected = "expected one of strings and an integer column label"
    with pytest.raises(ValueError, match=rf"has the columns .*{found}.*; {expected}"):
        text_data.read(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("", r"\[\]"),
        ("text\tclass\na\t1\n", r"\['text', 'class'\]"),
        ("text,label\na,1\n", r"\['text,label'\]"),
    ],
)
def test_a_tsv_file_without_text_and_label_is_refused_with_its_columns(
    text_data: Any, tmp_path: Path, content: str, found: str
) -> None:
    file = tmp_path / "wrong.tsv"
    file.write_text(content, encoding="utf-8")
    message = rf"wrong\.tsv has columns {found}; expected text and label"
    with pytest.raises(ValueError, match=message):
        text_data.read(str(file))
