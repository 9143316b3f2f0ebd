"""A rank-wise guide of one's own."""

from typing import Any

import pyro
import torch
from pyro import distributions as dist
from torch import Tensor, nn

from lrvd_pyro.guides import RankGuide


class Uniform(RankGuide):
    """Gates uniform around 1, of a learned width for each rank component."""

    def __init__(self, model: Any, width: float = 0.2) -> None:
        super().__init__(model)
        self.width = width
        self.log_width = nn.Parameter(width * model.space.ones())

    def forward(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        half = self.log_width.exp()
        gate = dist.Uniform(1 - half, 1 + half, validate_args=False).to_event(1)
        return {"gate": pyro.sample("gate", gate)}

    def mean(self) -> Tensor:
        return torch.ones_like(self.log_width)

    @property
    def log_alpha(self) -> Tensor:
        return (2 * self.log_width - torch.tensor(3.0).log()).detach()
