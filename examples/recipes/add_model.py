"""Add a model: a RankModel. Here: a random r x r core between A and B (LoRA-XS)."""

from typing import Any

import pyro
import torch

from lrvd_pyro.models import Factors, RankModel


class CoreLoRA(RankModel):
    binds = "cores"  # W0 x + s B C A x, with C ~ Normal(identity, 1)

    def __init__(self, net: Any, **arguments: Any) -> None:
        super().__init__(net, sides=("lora_A",), **arguments)

    def draw(self) -> Any:
        eye = torch.cat([self.space.ones(r).diag().view(-1) for r in self.space.ranks])
        return pyro.sample("core", pyro.distributions.Normal(eye, 1.0).to_event(1))

    def bind(self, value: torch.Tensor) -> Any:
        drawn = [f.lora_A.flatten(-2) for f in self.factors(value).values()]
        return self.space.bind_weights(torch.cat(drawn, -1))

    def factors(self, value: torch.Tensor) -> dict[str, Factors]:
        As, Bs = self.space.weights("lora_A"), self.space.weights("lora_B")
        cores = zip(As, value.split([r * r for r in self.space.ranks], -1))
        CAs = [C.unflatten(-1, (len(A), -1)) @ A for A, C in cores]
        ones = map(self.space.ones, self.space.ranks)
        return dict(zip(self.space.modules, map(Factors, CAs, Bs, ones)))
