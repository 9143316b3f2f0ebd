"""Where guides start the sites of a prior: inside their support, or it is an error."""

from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from nets import perceptron
from pyro import distributions as dist
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro import RankSpace, guides
from lrvd_pyro.models import GateLoRA

AUTO = [
    guides.delta,
    guides.iaf,
    guides.laplace,
    guides.low_rank_multivariate_normal,
    guides.multivariate_normal,
]


def prior_of(law: dist.TorchDistribution) -> Any:
    def prior(space: RankSpace) -> Tensor:
        gate: Tensor = pyro.sample("gate", law.expand([space.size]).to_event(1))
        return gate

    return prior


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 5), "labels": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("make", AUTO)
@pytest.mark.parametrize(
    "law, inside",
    [
        (dist.RelaxedBernoulli(torch.tensor(0.5), probs=torch.tensor(0.5)), 0.9),
        (dist.Beta(2.0, 2.0), 0.9),
        (dist.Uniform(0.0, 1.0), 0.5),
        (dist.Uniform(2.0, 3.0), 2.5),
        (dist.Pareto(1.0, 2.0), 2.0),
    ],
)
def test_a_start_at_the_edge_is_refused_and_the_way_out_works(
    make: Callable[..., Any], law: dist.TorchDistribution, inside: float
) -> None:
    prior = prior_of(law)
    model = GateLoRA(perceptron(), prior=prior, num_data=60)
    message = r"site 'gate' at 1.0, which is not inside .*prior.start = {'gate'"
    with pytest.raises(ValueError, match=message):
        make(model)
    prior.start = {"gate": inside}
    assert torch.equal(model.start()["gate"], torch.full((8,), inside))
    drawn = make(model)(**batch())["gate"]
    mine = dist.Independent(law.expand([8]), 1).support
    assert mine.check(drawn) and (drawn - inside).abs().max() < 0.5


@pytest.mark.parametrize(
    "law", [dist.Normal(0.0, 1.0), dist.Gamma(2.0, 2.0), dist.Uniform(0.9995, 1.0005)]
)
def test_a_start_inside_is_one(law: dist.TorchDistribution) -> None:
    model = GateLoRA(perceptron(), prior=prior_of(law), num_data=60)
    assert torch.equal(model.start()["gate"], torch.ones(8))


def shares(space: RankSpace) -> Tensor:
    """Gates that share a budget."""
    law = dist.Dirichlet(2 * space.ones())
    return space.size * pyro.sample("share", law)


def below_top(space: RankSpace) -> Tensor:
    """Gates below a limit that is latent itself."""
    top = pyro.sample("top", dist.LogNormal(space.ones(1) * 0, 3.0).to_event(1))
    law = dist.Uniform(0 * space.ones(), 3 * top)
    gate: Tensor = pyro.sample("gate", law.to_event(1))
    return gate


def test_a_start_on_a_simplex_or_below_a_latent_limit_is_inside() -> None:
    shares.start = {"share": 1 / 8}  # type: ignore[attr-defined]
    model = GateLoRA(perceptron(), prior=shares, num_data=60)
    torch.testing.assert_close(model.start()["share"], torch.full((8,), 1 / 8))
    model = GateLoRA(perceptron(), prior=below_top, num_data=60)
    for seed in range(20):  # whatever the limit that is drawn
        torch.manual_seed(seed)
        assert torch.equal(model.start()["gate"], torch.ones(8))


class Silent(lrvd.priors.LogUniform):
    """A prior that is false as a condition, as an empty container is."""

    def __len__(self) -> int:
        return 0


class SilentLikelihood(lrvd.likelihoods.Categorical):
    def __len__(self) -> int:
        return 0


def test_what_is_passed_is_used_even_if_it_is_false() -> None:
    prior, likelihood = Silent(), SilentLikelihood()
    for family in (GateLoRA, lrvd.models.FactorLoRA):
        made = family(perceptron(), num_data=60, prior=prior, likelihood=likelihood)
        assert made.prior is prior and made.likelihood is likelihood
    model, _ = lrvd.gauge.bayesianize(
        perceptron(), [batch()], prior=prior, likelihood=likelihood
    )
    assert model.prior is prior and model.likelihood is likelihood
