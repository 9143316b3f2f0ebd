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
def text_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module, with the cache of ``datasets`` in a folder of the test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return importlib.import_module("text_files")


def rows_of(part: str) -> Rows:
    return [{"text": f'{part} {i}, a "film"', "label": i % 2} for i in range(20)]


def write_json(rows: Rows, file: Path) -> None:
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


WRITERS: dict[str, Callable[[Rows, Path], Any]] = {
    "csv": lambda rows, file: Dataset.from_list(rows).to_csv(file),
    "jsonl": write_json,
    "parquet": lambda rows, file: Dataset.from_list(rows).to_parquet(file),
}


@pytest.fixture
def Text(text_files: Any) -> Any:
    return text_files.Text


@pytest.mark.parametrize("ending", WRITERS)
def test_of_a_folder_the_training_split_alone_is_read(
    text_files: Any, tmp_path: Path, ending: str
) -> None:
    for part in SPLITS:
        WRITERS[ending](rows_of(part), tmp_path / f"{part}.{ending}")
    data = text_files.read(str(tmp_path))
    assert data.texts == [row["text"] for row in rows_of("train")]
    assert data.labels == [0, 1] * 10
    assert {type(label) for label in data.labels} == {int}


def test_what_is_read_falls_into_disjoint_parts_also_if_it_repeats_itself(
    text_files: Any, tmp_path: Path
) -> None:
    WRITERS["csv"](rows_of("train") * 2, tmp_path / "train.csv")
    data = text_files.read(str(tmp_path))
    parts = importlib.import_module("text_data").split(data, len(data), seed=0)
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
@pytest.mark.parametrize("part", ["train", "validation"])
def test_of_glue_a_text_or_both_texts_of_a_pair_are_read(
    text_files: Any, Text: Any, glue: Path, config: str, part: str
) -> None:
    columns = [[f"{config} {part} {c} {i}" for i in range(3)] for c in GLUE[config]]
    name = f"{glue}:{config}" + (":validation" if part != "train" else "")
    assert text_files.read(name) == Text.of(columns, [1, 0, 1], ())


def test_a_split_whose_labels_are_hidden_is_refused(
    text_files: Any, tmp_path: Path
) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a"])})
    data = Dataset.from_dict({"text": ["x"], "label": [-1]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"rows without a label \(-1\); name another"):
        text_files.read(str(tmp_path))


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_labels_are_integers_of_any_width(
    text_files: Any, Text: Any, tmp_path: Path, kind: str
) -> None:
    features = Features({"text": Value("large_string"), "label": Value(kind)})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "train.parquet")
    assert text_files.read(str(tmp_path)) == Text(["a", "b"], [1, 0])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 0.5}], "'label': 'float64'}; expected strings, and a"),
        ([{"text": "a", "class": 1}], "'class': 'int64'}; expected strings, and a col"),
        ([{"size": 2, "label": 1}], r"has the columns \[\] besides label; expected te"),
        ([{"text": ["a", "b"], "label": 1}], r"has the columns \[\] besides label"),
        ([{"title": "a", "body": "b", "label": 1}], r"\['title', 'body'\] besides lab"),
    ],
)
def test_a_data_set_without_texts_or_labels_is_refused_with_its_columns(
    text_files: Any, tmp_path: Path, rows: Rows, message: str
) -> None:
    write_json(rows, tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=message):
        text_files.read(str(tmp_path))


def write(folder: Path, name: str, content: str) -> str:
    (folder / name).write_text(content, encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"has the columns \[\]; expected text or text_a and text_b, and label"),
        ("text\tclass\na\t1\n", r"the columns \['text', 'class'\]; expected text or"),
        ("text,label\na,1\n", r"has the columns \['text,label'\]; expected text or t"),
        ("text\tlabel\na\t1\nb\n", r"line 3: \['b'\]; expected an entry for each"),
        ("text\tlabel\na\tb\t1\n", r"line 2: .*; expected an entry for each of the"),
        ("text\tlabel\na\t\n", r"line 2: \['a', ''\]; .* and a label"),
        ("text\tlabel\na\t \n", r"line 2: \['a', ' '\]; .* and a label"),
        ("text\ttext\tlabel\na\tb\t1\n", r"\['text', 'text', 'label'\]; .*each once"),
        ("a\tb\tlabel\nx\ty\t1\n", r"the columns \['a', 'b'\] besides label; exp"),
        ("text\tlabel\na\t0.5\nb\t1.5\n", r"the labels \['0.5', '1.5'\], ...; expec"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_what_it_has(
    text_files: Any, tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text_files.read(write(tmp_path, "wrong.tsv", content))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a,1\nb,0\n', "line 3: unexpected end of data"),
        ("text,label\n" + "a" * 200_000 + ",1\n", "line 2: field larger than field"),
        ("text,label\n", "has no rows; expected a text and a label in each"),
    ],
)
def test_a_csv_file_that_would_lose_rows_is_refused(
    text_files: Any, tmp_path: Path, content: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text_files.read(write(tmp_path, "wrong.csv", content))


def test_a_tsv_file_takes_quote_characters_as_text_and_a_csv_file_does_not(
    text_files: Any, Text: Any, tmp_path: Path
) -> None:
    tsv = write(tmp_path, "a.tsv", 'text\tlabel\n"an open quote\t1\nnext\t0\n')
    assert text_files.read(tsv) == Text(['"an open quote', "next"], [1, 0])
    # with the mark that spreadsheets put before a header, and a line break in a text
    csv = write(tmp_path, "a.csv", '\ufefflabel,text\n1,"say ""a"",\nb"\n0,next\n')
    assert text_files.read(csv) == Text(['say "a",\nb', "next"], [1, 0])


@pytest.mark.parametrize(
    ("labels", "indices", "classes"),
    [
        ("0 1 5 1", [0, 1, 2, 1], ("0", "1", "5")),
        ("10 9 -1 9", [2, 1, 0, 1], ("-1", "9", "10")),
        ("yes no maybe no", [2, 1, 0, 1], ("maybe", "no", "yes")),
        ("+1 -1 -1", [1, 0, 0], ("-1", "+1")),
        ("1 01 2 1", [1, 0, 2, 1], ("01", "1", "2")),
    ],
)
def test_labels_are_numbers_or_names_and_no_class_is_made_up(
    text_files: Any, tmp_path: Path, labels: str, indices: list[int], classes: Any
) -> None:
    # Spaces around a label are no part of it.
    rows = "".join(
        f"{i}\t{label:>{5 + i % 2}}\n" for i, label in enumerate(labels.split())
    )
    data = text_files.read(write(tmp_path, "a.tsv", "text\t label\n" + rows))
    assert data.labels == indices and data.classes == classes


def test_a_test_file_has_the_classes_of_the_training_file(
    text_files: Any, tmp_path: Path
) -> None:
    test = write(tmp_path, "test.csv", "text,label\na,sad\nb,glad\n")
    assert text_files.read(test, ("glad", "mad", "sad")).labels == [2, 0]
    message = r"has the labels \['sad'\]; the classes are \['glad', 'mad'\]"
    with pytest.raises(ValueError, match=message):
        text_files.read(test, ("glad", "mad"))


def test_columns_that_are_not_read_are_said_to_be_left_out(
    text_files: Any, Text: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "id,text_b,text_a,label\n7,b,a,1\n"
    data = text_files.read(write(tmp_path, "pairs.csv", rows))
    assert data == Text(["a"], [0], ["b"])
    out = capsys.readouterr().out
    assert out.endswith("pairs.csv: reads text_a and text_b, leaves out id\n")
    text_files.read(write(tmp_path, "plain.csv", "text,label\na,1\n"))
    assert capsys.readouterr().out == ""


RTE = Path(__file__).parents[3] / "shared" / "data" / "rte" / "dev.tsv"


def test_the_pairs_of_a_real_file_are_read_whole(text_files: Any) -> None:
    if not RTE.exists():
        pytest.skip("no RTE: it lies outside the project")
    data = text_files.read(str(RTE))
    lines = RTE.read_text(encoding="utf-8").splitlines()[1:]
    assert ["\t".join(row) for row in data.rows] == [
        x.rpartition("\t")[0] for x in lines
    ]
    assert data.labels.count(0) == 146 and data.labels.count(1) == 131
