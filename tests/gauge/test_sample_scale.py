"""The largest noise that draws bear."""

import math
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from lrvd_pyro.gauge import noise_by_evidence
from lrvd_pyro.gauge.sample_scale import (
    effect_of_draws,
    sample_scale,
    spread_examples,
)
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Categorical, Normal
from lrvd_pyro.models import GateLoRA

A = 0.25  # the variance to scale


class Square(nn.Module):
    """``y = |W x|^2``, where LoRA is all of W."""

    def __init__(self, features: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(features, features, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().sum(-1, keepdim=True)


class Kink(Square):
    """``y = |w x|`` but for a trace: about w = 0 it is even at every noise."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y.abs() + 1e-6 * y


class Product(nn.Module):
    """``y = w v x``: gates of both move y by their product, of mean 0."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Linear(1, 1, bias=False) for _ in range(2))
        nn.init.zeros_(self.first.weight)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class CommonShift(nn.Module):
    """Logits that share a term of second order; their differences are linear."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 3, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + 100 * y.square().sum(1, keepdim=True)


def model_of(net: nn.Module, *targets: str, r: int = 1, **options: Any) -> GateLoRA:
    adapted = nets.lora(net, target_modules=list(targets), r=r)
    return GateLoRA(adapted, num_data=60, **({"likelihood": Normal(1.0)} | options))


def scale_of(model: GateLoRA, x: Tensor, most: float = 1e5, **options: Any) -> float:
    size = model.space.size
    batches = [{"x": rows} for rows in x.split(30)]
    variance = torch.full((size,), A)
    return sample_scale(model, torch.ones(size), variance, batches, most, **options)


def test_draws_get_the_noise_at_which_their_mean_moves_as_far_as_they_spread() -> None:
    """Of ``sum_i w_i^2 z_i^2`` with z_i ~ N(1, s a), R = 96.

    The mean moves by ``s a sum_i w_i^2``, and the odd part has the variance ``4 s a
    sum_i w_i^4``.
    """
    model, x = model_of(Square(96), "layer", r=96), torch.ones(4, 96)
    (rows,), (columns,) = model.space.weights("lora_A"), model.space.weights("lora_B")
    w = torch.linspace(0.5, 1.5, 96)
    with torch.no_grad():
        rows.copy_(torch.eye(96))
        columns.copy_(w.diag() / 8)  # 8 / 96 is PEFT's scaling
    exact = 4 * float((w**4).sum() / (w**2).sum() ** 2) / A
    found = [scale_of(model, x, seed=seed) for seed in range(4)]
    assert all(0.6 * exact < scale < 1.05 * exact for scale in found)
    assert scale_of(model, x, 0.5 * exact) == 0.5 * exact


def test_a_single_gate_gets_its_noise_within_what_the_docstring_says() -> None:
    """z^2 moves by s a, and spreads by 2 sqrt(s a) in its odd part."""
    model, x = model_of(Square(), "layer"), torch.ones(60, 1)
    found = torch.tensor([scale_of(model, x, seed=seed) for seed in range(12)]) * A / 4
    assert ((found > 0.45) & (found < 1.35)).all()
    assert 0.7 < found.mean() < 0.95
    assert len(set(found.tolist())) == 12


def test_the_squared_shift_has_no_bias() -> None:
    """Products of two gates' noises are even, and move no mean."""
    model = model_of(Product(), "first", "second")
    parts = [{"x": torch.ones(1, 1)}]
    sides: Any = ("lora_A", "lora_B")
    w = 64 * math.prod(model.space.flatten(*sides).tolist())  # 8 is PEFT's scaling
    drawn = [
        effect_of_draws(model, torch.ones(2), torch.full((2,), A), parts, 16, seed)
        for seed in range(400)
    ]
    shifts = torch.tensor([each.shift for each in drawn]) / w**2
    error = float(shifts.std()) / 20
    assert abs(float(shifts.mean())) < 4 * error
    assert A**2 / 16 > 8 * error  # the twin: the bias of the plain square
    noise = torch.tensor([each.noise for each in drawn]) / w**2
    assert float(noise.mean()) == pytest.approx(2 * A, rel=0.05)
    told = torch.tensor([each.error for each in drawn]) / w**2
    seen = (shifts - noise).std()
    assert float(told.mean()) == pytest.approx(float(seen), rel=0.2)


def test_examples_of_all_batches_count() -> None:
    """Of the first batch alone, which moves nothing, there would be no scale."""
    model = model_of(Square(), "layer")
    ones, zeros = torch.ones(60, 1), torch.zeros(150, 1)
    both = scale_of(model, torch.cat([zeros, ones]))
    assert both == pytest.approx(scale_of(model, ones))
    batches = [{"x": torch.arange(20.0)[:, None] + 20 * i} for i in range(50)]
    parts = spread_examples(batches)
    rows = torch.cat([part["x"] for part in parts]).flatten()
    assert 32 <= len(rows) <= 64
    assert rows.min() == 0 and rows.max() > 900
    gaps = rows[4::4] - rows[:-4:4]
    assert (gaps == gaps[0]).all()
    assert len(spread_examples(batches[:1])) == 5  # all there are


class Raw(Categorical):
    def contrasts(self, predictions: Tensor) -> Tensor:
        return predictions


def test_contrasts_decide_and_not_what_they_leave_out() -> None:
    model = model_of(CommonShift(), "layer", likelihood=None)
    assert scale_of(model, torch.ones(30, 1), 100.0) == 100.0
    raw = model_of(CommonShift(), "layer", likelihood=Raw())  # the twin
    assert scale_of(raw, torch.ones(30, 1), 100.0) < 50


def test_a_network_linear_in_its_gates_bears_all_of_the_noise() -> None:
    model = GateLoRA(nets.regression(), likelihood=Normal(1.0), num_data=30)
    guide, batch = RankDiagonal(model), {"x": 3 * torch.randn(30, 5)}
    noise_by_evidence(model, guide, [batch])
    assert guide.linearized_scale == pytest.approx(1.0)


def test_what_has_no_scale_is_refused() -> None:
    model = model_of(Square(), "layer")
    with pytest.raises(ValueError, match="noise moves no prediction of these batches"):
        scale_of(model, torch.zeros(60, 1))
    with pytest.raises(ValueError, match="posterior mean are not finite; look for NaN"):
        scale_of(model, torch.full((60, 1), torch.nan))
    with pytest.raises(ValueError, match="no batches the second time; .* a DataLoader"):
        sample_scale(model, torch.ones(1), torch.ones(1), [], 1.0)
    even = model_of(Kink(), "layer")
    with torch.no_grad():
        layer = even.space.layers[0]
        layer.base_layer.weight.sub_(layer.get_delta_weight("default"))
    with pytest.raises(ValueError, match="by more than they spread, .*: take float32"):
        scale_of(even, torch.ones(60, 1))
