"""The largest noise that draws bear."""

import nets
import pytest
import torch
from torch import Tensor, nn

from lrvd_pyro.gauge import noise_by_evidence
from lrvd_pyro.gauge.sample_scale import sample_scale
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Normal
from lrvd_pyro.models import GateLoRA


class Square(nn.Module):
    """``y = (w x)^2``, where LoRA is the whole weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) ** 2


def test_draws_get_the_noise_at_which_their_mean_moves_as_far_as_they_spread() -> None:
    """z ~ N(1, s a): z^2 moves by s a, and spreads by 2 sqrt(s a) in its odd part."""
    net = nets.lora(Square(), target_modules=["layer"], r=1)
    model = GateLoRA(net, likelihood=Normal(1.0), num_data=30)
    batch = {"x": torch.ones(30, 1), "labels": torch.zeros(30)}
    mean, variance = torch.ones(1), torch.full((1,), 0.25)
    found = sample_scale(model, mean, variance, [batch], 1000.0)
    # The shift s a equals the spread 2 sqrt(s a) at s a = 4; of few draws, roughly.
    assert 1.5 < found * 0.25 < 12
    assert sample_scale(model, mean, variance, [batch], 0.5) == 0.5


def test_a_network_linear_in_its_gates_bears_all_of_the_noise() -> None:
    model = GateLoRA(nets.regression(), likelihood=Normal(1.0), num_data=3000)
    guide, batch = RankDiagonal(model), {"x": torch.randn(30, 5)}
    noise_by_evidence(model, guide, [batch])
    assert guide.linearized_scale == pytest.approx(1.0)
