"""Labeled text from files and from data sets of the hub."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from text_data import Text

PAIRS = (
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("question", "passage"),
)
WHOLE = re.compile(r"[-+]?\d+")
REAL = re.compile(r"[-+]?(\d*\.\d+|\d+\.?)([eE][-+]?\d+)?|nan")


class Table(NamedTuple):
    """Columns of strings by name, and the labels as strings."""

    columns: dict[str, list[str]]
    labels: list[str]


def read(name: str, classes: Sequence[str] | None = None) -> Text:
    """A file, known by its ending ``.tsv`` or ``.csv``, or a data set of the hub.

    Texts are the column ``text``, the two columns of one of `PAIRS`, or the only column
    of strings. Labels are the column ``label``: whole numbers, which need not be 0, 1,
    2, ..., or names. Prints which columns are left out.

    Args:
        name: A path, or the hub's ``name``, ``name:config`` or ``name:config:split``.
        classes: The labels in the order of their class indices; None takes those here.

    Raises:
        ValueError: If rows, columns or labels are missing or not of their kind, or if a
            label is none of ``classes``.
    """
    is_file = Path(name).suffix in (".tsv", ".csv")
    table = read_file(Path(name)) if is_file else read_hub(name)
    if not table.labels:
        raise ValueError(f"{name} has no rows; expected a text and a label in each")
    chosen = text_columns(name, [*table.columns])
    found = sorted_classes(name, table.labels)
    known = found if classes is None else list(classes)
    if strange := [label for label in found if label not in known]:
        raise ValueError(f"{name} has the labels {strange}; the classes are {known}")
    if others := [column for column in table.columns if column not in chosen]:
        print(f"{name}: reads {' and '.join(chosen)}, leaves out {', '.join(others)}")
    index = {label: i for i, label in enumerate(known)}
    labels = [index[label] for label in table.labels]
    columns = [table.columns[column] for column in chosen]
    return Text.of(columns, labels, tuple(known))


def read_file(path: Path) -> Table:
    """A table with a header: tabs without quoting, or commas with the quotes of CSV."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".tsv":
            lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        else:  # strict, since a quote left open would swallow the rows that follow
            lines = csv.reader(file, strict=True)
        try:
            header, *rows = [(lines.line_num, row) for row in lines if row] or [(1, [])]
        except csv.Error as error:
            raise ValueError(f"{path}, line {lines.line_num}: {error}") from error
    names = [name.strip() for name in header[1]]
    known = {"text", "label"}.union(*PAIRS)
    if "label" not in names or any(names.count(name) > 1 for name in known):
        raise ValueError(
            f"{path} has the columns {names}; expected text or text_a and text_b, and "
            f"label, each once"
        )
    for number, row in rows:
        if len(row) != len(names) or not row[names.index("label")].strip():
            raise ValueError(
                f"{path}, line {number}: {row}; expected an entry for each of the "
                f"columns {names}, and a label"
            )
    columns = {name: [row[i] for _, row in rows] for i, name in enumerate(names)}
    labels = [label.strip() for label in columns.pop("label")]
    return Table(columns, labels)


def read_hub(name: str) -> Table:
    """A split of a data set, ``train`` unless named."""
    from datasets import load_dataset  # takes seconds, and only this function needs it

    path, config, split = (*name.split(":"), "", "")[:3]
    rows = load_dataset(path, config or None, split=split or "train")
    kinds = {column: getattr(f, "dtype", "") for column, f in rows.features.items()}
    kind = kinds.get("label", "none")
    if "int" not in kind and not kind.endswith("string"):
        raise ValueError(
            f"{name} has the columns {kinds}; expected strings, and a column label of "
            f"whole numbers or strings"
        )
    labels = list(rows["label"])
    # The hub's mark of a hidden label, as in the test sets of GLUE.
    if hasattr(rows.features["label"], "names") and -1 in labels:
        raise ValueError(f"{name} has rows without a label (-1); name another split")
    strings = [c for c, k in kinds.items() if k.endswith("string") and c != "label"]
    return Table({c: list(rows[c]) for c in strings}, list(map(str, labels)))


def text_columns(name: str, columns: Sequence[str]) -> Sequence[str]:
    """The columns that hold the texts: one, or two for pairs."""
    if "text" in columns:
        return ["text"]
    for pair in PAIRS:
        if set(pair) <= set(columns):
            return pair
    if len(columns) != 1:
        pairs = "; ".join(" and ".join(pair) for pair in PAIRS)
        raise ValueError(
            f"{name} has the columns {list(columns)} besides label; expected text, a "
            f"single column of strings, or a pair: {pairs}"
        )
    return columns


def sorted_classes(name: str, labels: Sequence[str]) -> list[str]:
    """The different labels, in order of their numbers or of the alphabet."""
    classes = set(labels)
    if all(WHOLE.fullmatch(label) for label in classes):
        return sorted(classes, key=lambda label: (int(label), label))
    if all(REAL.fullmatch(label) for label in classes):
        raise ValueError(
            f"{name} has the labels {sorted(classes)[:3]}, ...; expected classes, as "
            f"whole numbers or names"
        )
    return sorted(classes)
