"""The mean and covariance of the gate that the linearized predictive needs."""

from collections.abc import Iterator
from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from torch import Tensor

from lrvd_pyro import guides, priors
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.predictive.linearized import GateGaussian, gate_gaussian


def guide_of(prior: Any, build: Any) -> tuple[GateLoRA, Any]:
    model = GateLoRA(bert(), num_data=60, prior=prior)
    guide = build(model)
    guide(**tokens())
    return model, guide


def widened(model: GateLoRA) -> RankDiagonal:
    guide = RankDiagonal(model, init_log_alpha=-3.0)
    with torch.no_grad():
        guide.log_variance.add_(torch.randn_like(guide.log_variance) / 2)
    return guide


def low_rank(model: GateLoRA) -> Any:
    return guides.low_rank_multivariate_normal(model, init_scale=0.3)


def full(model: GateLoRA) -> Any:
    return guides.multivariate_normal(model, init_scale=0.3)


def flow(model: GateLoRA) -> Any:
    return guides.iaf(model, init_scale=0.3)


@pytest.mark.parametrize(
    ("prior", "build", "closed"),
    [
        (priors.LogUniform, widened, True),
        (priors.TruncatedLogUniform, widened, True),
        (lambda: priors.Normal(1.0), low_rank, True),
        (lambda: priors.Normal(1.0), full, True),
        (lambda: priors.Normal(1.0), flow, False),
        (priors.Horseshoe, widened, False),
        (priors.Horseshoe, low_rank, False),
    ],
)
def test_mean_and_covariance_are_those_of_the_guides_own_draws(
    prior: Any, build: Any, closed: bool
) -> None:
    model, guide = guide_of(prior(), build)
    count = 1500
    draws = []
    with torch.no_grad():
        gaussian = gate_gaussian(model, guide, tokens())
        for _ in range(count):
            draws.append(model.value_at(dict(sites(guide))))
    gates = torch.stack(draws)
    assert (len(gaussian.factors) < 4096) == closed
    axes = torch.eye(16).unsqueeze(0)
    covariance = gaussian.project(axes)[0]
    scale = gates.std(0)
    error = (gates.mean(0) - gaussian.mean) / scale
    assert error.abs().max() < 0.2
    error = (gates.T.cov() - covariance) / scale / scale[:, None]
    assert error.abs().max() < 0.3 if closed else error.abs().median() < 0.1
    if closed:
        mistaken = (gates.T.cov() - 2 * covariance) / scale / scale[:, None]
        assert mistaken.abs().max() > 0.5


def sites(guide: Any) -> Iterator[tuple[str, Tensor]]:
    trace = pyro.poutine.trace(guide).get_trace(**tokens())
    for name in trace.stochastic_nodes:
        yield name, trace.nodes[name]["value"]


def test_one_draw_has_no_covariance() -> None:
    gates = 1 + torch.randn(3, 16)
    assert GateGaussian.of_draws(gates[:2]).factors.shape == (2, 16)
    with pytest.raises(ValueError, match="got 1 draw of the posterior; expected at"):
        GateGaussian.of_draws(gates[:1])
