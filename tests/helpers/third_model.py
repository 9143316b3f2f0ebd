"""A model of a third kind: a core of r x r random numbers in every LoRA module."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro import RankSpace
from lrvd_pyro.models import Factors, RankModel


class CoreLoRA(RankModel):
    """``y = W0 x + scaling * B C A x`` with A and B fixed and C ~ Normal(I, scale)."""

    binds = "cores"

    def __init__(
        self, net: Any, *, prior: Any = None, scale: float = 1.0, **arguments: Any
    ) -> None:
        prior = identity if prior is None else prior
        super().__init__(net, prior=prior, sides=("lora_A",), **arguments)
        self.scale = scale
        for side in ("lora_A", "lora_B"):
            for weight in self.space.weights(side):
                weight.requires_grad_(False)

    def draw(self) -> Tensor:
        """The cores of all modules, row by row, one after another."""
        loc = self.prior(self.space)
        core: Tensor = pyro.sample("core", dist.Normal(loc, self.scale).to_event(1))
        return core

    def bind(self, value: Tensor) -> AbstractContextManager[None]:
        """Use C A for A."""
        rows = [(core @ A).flatten(-2) for core, A in self._cores(value)]
        return self.space.bind_weights(torch.cat(rows, -1))

    def factors(self, value: Tensor) -> dict[str, Factors]:
        """C A, and the network's own B."""
        pairs = zip(self._cores(value), self.space.weights("lora_B"))
        ones = self.space.split(self.space.ones()).items()
        return {
            name: Factors(core @ A, B, one)
            for (name, one), ((core, A), B) in zip(ones, pairs)
        }

    def _cores(self, value: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The core of each module, ``... x r x r``, and its A."""
        ranks = self.space.ranks
        parts = value.split([r * r for r in ranks], -1)
        for part, r, A in zip(parts, ranks, self.space.weights("lora_A")):
            yield part.unflatten(-1, (r, r)), A


def identity(space: RankSpace) -> Tensor:
    """Where the cores change nothing."""
    return torch.cat([torch.eye(r, device=space.device).flatten() for r in space.ranks])
