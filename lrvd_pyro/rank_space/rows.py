"""Weights A and B rank component by rank component: rows of A, columns of B."""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Size, Tensor

from lrvd_pyro.rank_space.bank import Parts

__all__ = ["Rows", "Side", "split_rows"]

Side = Literal["lora_A", "lora_B"]


class Rows(NamedTuple):
    """How a weight falls into one row of numbers per rank component, ``r x width``.

    In a convolution the row of a component is its whole kernel, ``in x k x k``. In a
    grouped one, PEFT groups B alone: a component reaches only the ``out / groups``
    outputs of its group, and they are its column.

    Attributes:
        side: Which weight it is.
        shape: ``r x in x ...`` for A, ``out x r / groups x ...`` for B.
        rank: The number r of rank components.
    """

    side: Side
    shape: Size
    rank: int

    @property
    def width(self) -> int:
        """The length of a row."""
        return self.shape.numel() // self.rank

    def flatten(self, weight: Tensor) -> Tensor:
        """The rows of a weight, one after another."""
        if self.side == "lora_A":
            return weight.reshape(-1)
        *groups, columns = self._by_group()
        return weight.reshape(*groups, -1, columns).mT.reshape(-1)

    def unflatten(self, flat: Tensor) -> Tensor:
        """The weight ``... x shape`` whose rows these are, one after another."""
        batch = flat.shape[:-1]
        if self.side == "lora_A":
            return flat.view(*batch, *self.shape)
        rows = flat.view(*batch, *self._by_group(), -1)
        return rows.mT.reshape(*batch, *self.shape)

    def _by_group(self) -> tuple[int, ...]:
        """The groups of B, if it is a grouped convolution, and the ranks of each."""
        columns = self.shape[1]
        return (columns,) if columns == self.rank else (self.rank // columns, columns)


def split_rows(value: Tensor, layout: Mapping[Side, Sequence[Rows]]) -> Parts:
    """Drawn weights by side and module, from all their rows in one vector.

    Raises:
        ValueError: If the shape does not fit.
    """
    sizes = {side: [r.shape.numel() for r in rows] for side, rows in layout.items()}
    lengths = [sum(each) for each in sizes.values()]
    if value.dim() not in (1, 2) or value.shape[-1] != sum(lengths):
        raise ValueError(
            f"the drawn weights have shape {tuple(value.shape)}; expected "
            f"({sum(lengths)},) or (batch, {sum(lengths)}) for {tuple(layout)}"
        )
    parts: Parts = {}
    for (side, rows), flat in zip(layout.items(), torch.split(value, lengths, -1)):
        pieces = zip(rows, torch.split(flat, sizes[side], -1), strict=True)
        parts[side] = [each.unflatten(piece) for each, piece in pieces]
    return parts
