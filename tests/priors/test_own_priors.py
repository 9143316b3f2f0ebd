"""Priors with parameters of their own, and rank spaces of the smallest size."""

from typing import Any

import pyro
import pytest
import torch
from families import PRIORS
from nets import bert, regression, tokens
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.normal import Normal as Gaussian
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.priors.hierarchical import Horseshoe


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_a_single_rank_component_will_do(prior: Any) -> None:
    net = regression(features=4, r=1)
    model = GateLoRA(net, prior=prior(), num_data=9, likelihood=Gaussian())
    guide = RankDiagonal(model)
    batch = {"x": torch.randn(5, 4), "labels": torch.randn(5)}
    with torch.no_grad():
        loss = lrvd.RankELBO().differentiable_loss(model, guide, **batch)
    assert loss.isfinite() and guide.mean().shape == (1,)


class LearnedScale(PyroModule):
    """A prior of one's own with a positive parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = PyroParam(torch.ones(1), constraints.positive)

    def forward(self, space: Any) -> Tensor:
        scale = self.scale.expand(space.size)
        return pyro.sample(
            "gate", dist.Normal(torch.zeros(space.size), scale).to_event(1)
        )


def test_a_learned_scale_of_ones_own_trains_under_both_drivers() -> None:
    for driver in ("svi", "torch"):
        model = GateLoRA(bert(), prior=LearnedScale(), num_data=60)
        guide = RankDiagonal(model)
        if driver == "svi":
            SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO()).step(**tokens())
        else:
            loss = lrvd.RankELBO()(model, guide)
            optim = torch.optim.Adam(lrvd.optim.parameter_groups(model, guide))
            loss(**tokens()).backward()
            optim.step()
        assert model.prior.scale_unconstrained != 0


def test_rank_one_everywhere_holds_the_ranks_and_learns_the_modules() -> None:
    model = GateLoRA(bert(r=1), prior=Horseshoe(), num_data=60)
    assert RankDiagonal(model).held == ("rank_scale",)
