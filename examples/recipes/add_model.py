"""Add a model: a RankModel. Here: a random r x r core between A and B (LoRA-XS)."""

from contextlib import AbstractContextManager

import torch
from pyro import distributions as dist
from pyro import sample
from torch import Tensor

from lrvd_pyro.models import Factors, RankModel


class CoreLoRA(RankModel):
    binds = "cores"  # W0 x + s B C A x, with C ~ Normal(identity, 1)

    def draw(self) -> Tensor:
        eye = torch.cat([self.space.ones(r).diag().view(-1) for r in self.space.ranks])
        core: Tensor = sample("core", dist.Normal(eye, 1.0).to_event(1))
        return core

    def bind(self, value: Tensor) -> AbstractContextManager[None]:
        drawn = [each.lora_A.flatten(-2) for each in self.factors(value).values()]
        return self.space.bind_weights(torch.cat(drawn, -1))

    def factors(self, value: Tensor) -> dict[str, Factors]:
        cores = value.split([r * r for r in self.space.ranks], -1)
        As, Bs = self.space.weights("lora_A"), self.space.weights("lora_B")
        CAs = [C.unflatten(-1, (len(A), -1)) @ A for C, A in zip(cores, As)]
        ones = self.space.split(self.space.ones())
        return dict(zip(ones, map(Factors, CAs, Bs, ones.values())))
