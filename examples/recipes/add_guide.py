"""Add a guide: a RankGuide, which `prune` and `save` take. Here: Laplace noise."""

from pyro import distributions as dist
from torch import Tensor, nn

import lrvd_pyro as lrvd


class LaplaceGates(lrvd.guides.RankGuide):
    """Gates ~ Laplace(1, b), of heavier tails than a Gaussian; alpha = 2 b^2."""

    def __init__(self, model: lrvd.models.GateLoRA) -> None:
        super().__init__(model)
        self.log_b = nn.Parameter(self.space.ones() - 2.0)

    def forward(self, *args: object, **batch: object) -> dict[str, Tensor]:
        return self.draw_independent({"gate": dist.Laplace(1.0, self.log_b.exp())})

    def mean(self) -> Tensor:
        return self.space.ones()

    @property
    def log_alpha(self) -> Tensor:
        return (2 * self.log_b.detach().exp().square()).log()
