"""Which rank components belong together: by module, layer, module type, or all."""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Level = Literal["global", "module", "layer", "type", "rank"]
SHARED = ("module", "layer", "type")  # of which a vector may have one per group
Coordinates = dict[str, list[str] | list[int]]


class Groups:
    """The rank components of modules, in order, and their groups at each `Level`.

    Args:
        modules: Dotted names.
        ranks: How many rank components each has.
    """

    def __init__(self, modules: Sequence[str], ranks: Sequence[int]) -> None:
        self.modules, self.ranks = tuple(modules), tuple(ranks)
        self._found: dict[tuple[Level, torch.device], tuple[Tensor, int]] = {}

    def coordinates(self) -> Coordinates:
        """See `RankSpace.coordinates`."""
        found = [re.search(r"(?:^|\.)(\d+)\.(.+)$", name) for name in self.modules]
        layers = [int(m.group(1)) if m else -1 for m in found]
        types = [m.group(2) if m else name for m, name in zip(found, self.modules)]
        each = [i for i, r in enumerate(self.ranks) for _ in range(r)]
        return {
            "module": [self.modules[i] for i in each],
            "type": [types[i] for i in each],
            "layer": [layers[i] for i in each],
            "rank": [j for r in self.ranks for j in range(r)],
        }

    def at(self, level: Level, device: torch.device) -> tuple[Tensor, int]:
        """Each component's group, (R,), and how many there are; found once."""
        key = level, device
        if key not in self._found:
            numbers = self._numbers(level)
            with torch.inference_mode(False):  # a backward pass may keep the tensor
                index = torch.tensor(numbers, device=device)
            self._found[key] = index, max(numbers) + 1
        return self._found[key]

    def indices_kept(self, keep: Tensor, name: str, size: int) -> Tensor:
        """See `RankSpace.indices_kept`."""
        level = name.rpartition(".")[2].partition("_")[0]
        if level in SHARED:
            group, count = self.at(level, keep.device)  # type: ignore[arg-type]
            if size == count:
                left = list(dict.fromkeys(group[keep].tolist()))
                return torch.tensor(left, device=keep.device)
        if size == len(keep):
            return keep.nonzero().squeeze(-1)
        if size == 1:
            return torch.zeros(1, dtype=torch.long, device=keep.device)
        raise TypeError(
            f"{name!r} has {size} components, and nothing says to which of the "
            f"{len(keep)} rank components they belong; give it one, one per rank "
            f"component, or one per group and a name that says so: module_scale, "
            f"layer_scale, type_scale"
        )

    def _numbers(self, level: Level) -> list[int]:
        if level == "global":
            return [0] * sum(self.ranks)
        if level == "rank":
            return list(range(sum(self.ranks)))
        labels = self.coordinates()[level]
        number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return [number[label] for label in labels]
