"""The groups of rank components: by module, layer, module type, or all together."""

import re
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Coordinates", "Groups", "Level"]

Level = Literal["global", "module", "layer", "type", "rank"]
Coordinates = dict[str, list[str] | list[int]]
_GROUPED = ("module", "layer", "type")  # levels whose groups a site's name may tell


class Groups:
    """Assigns each rank component to its group at each `Level`.

    Args:
        modules: Dotted names of the modules, in the order of their rank components.
        ranks: The number of rank components of each module.
    """

    def __init__(self, modules: Sequence[str], ranks: Sequence[int]) -> None:
        self.modules, self.ranks = tuple(modules), tuple(ranks)
        self._cache: dict[tuple[Level, torch.device], tuple[Tensor, int]] = {}

    def coordinates(self) -> Coordinates:
        """See `RankSpace.coordinates`."""
        matches = [re.search(r"(?:^|\.)(\d+)\.(.+)$", name) for name in self.modules]
        layers = [int(m.group(1)) if m else -1 for m in matches]
        types = [m.group(2) if m else name for m, name in zip(matches, self.modules)]
        owners = [i for i, r in enumerate(self.ranks) for _ in range(r)]
        return {
            "module": [self.modules[i] for i in owners],
            "type": [types[i] for i in owners],
            "layer": [layers[i] for i in owners],
            "rank": [j for r in self.ranks for j in range(r)],
        }

    def at(self, level: Level, device: torch.device) -> tuple[Tensor, int]:
        """The group number of each component, ``R``, and the number of groups."""
        key = level, device
        if key not in self._cache:
            numbers = self._numbers(level)
            # The first call may come under inference_mode (in a prediction); a later
            # backward pass cannot save a tensor that was made there.
            with torch.inference_mode(False):
                index = torch.tensor(numbers, device=device)
            self._cache[key] = index, max(numbers) + 1
        return self._cache[key]

    def indices_kept(self, keep: Tensor, name: str, size: int) -> Tensor:
        """See `RankSpace.indices_kept`."""
        level = name.rpartition(".")[2].partition("_")[0]
        if level in _GROUPED:
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
            f"{len(keep)} rank components each belongs; give it one component, one per "
            f"rank component, or one per group under a name that says so: "
            f"module_scale, layer_scale, type_scale (a tensor of a model or guide of "
            f"your own: override cuts(keep))"
        )

    def _numbers(self, level: Level) -> list[int]:
        if level == "global":
            return [0] * sum(self.ranks)
        if level == "rank":
            return list(range(sum(self.ranks)))
        labels = self.coordinates()[level]
        number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
        return [number[label] for label in labels]
