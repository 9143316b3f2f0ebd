"""A gate counted w times costs w times its KL, however that is found."""

from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from pairs import rank_guide
from pyro import distributions as dist
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from torch import Tensor
from torch.distributions import kl_divergence

import lrvd_pyro as lrvd
from lrvd_pyro import distributions, guides
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference.param_store import give_own_name
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.priors.log_uniform import LogUniform

pytestmark = pytest.mark.filterwarnings("ignore:no closed form")
MODELS = pytest.mark.parametrize("family", [GateLoRA, FactorLoRA])
NOISE = pytest.mark.parametrize("noise", ["example", "batch"])
W = 8.0


def model_of(family: Any, multiplicity: float) -> Any:
    torch.manual_seed(5)
    return family(bert(r=2), prior=LogUniform(multiplicity), num_data=60)


def terms_of(model: Any, guide: Any, noise: Any) -> dict[str, Any]:
    """The terms of one loss, which is their sum."""
    elbo = lrvd.RankELBO(noise=noise)
    torch.manual_seed(6)
    loss = elbo.loss(model, guide, **tokens(4))
    terms = elbo.terms
    assert loss == pytest.approx(float(terms["kl"]["total"] - terms["log_likelihood"]))
    return terms


def auto_normal(model: Any) -> AutoNormal:
    start = init_to_value(values=model.start())
    return give_own_name(AutoNormal(model, init_loc_fn=start))


@NOISE
@MODELS
def test_the_closed_form_counts_w_times(family: Any, noise: Any) -> None:
    for make in (rank_guide, auto_normal):
        single, eightfold = (
            terms_of(model, make(model), noise)
            for model in (model_of(family, 1.0), model_of(family, W))
        )
        assert single["kl"].keys() == eightfold["kl"].keys()
        for name, kl in single["kl"].items():
            torch.testing.assert_close(eightfold["kl"][name], W * kl)
        torch.testing.assert_close(
            eightfold["log_likelihood"], single["log_likelihood"]
        )


def joint_equal(model: Any, diagonal: RankDiagonal) -> tuple[Any, Any]:
    """The prior alone, and a joint guide of the same distribution as ``diagonal``."""

    def prior(**batch: Tensor) -> None:
        model.draw()

    guide = give_own_name(AutoMultivariateNormal(prior))
    guide(x=torch.zeros(4))
    (q,) = diagonal.distributions().values()
    guide.loc.data = q.mean.detach()
    guide.scale = q.stddev.detach()
    return prior, guide


@NOISE
@MODELS
def test_monte_carlo_counts_w_times(family: Any, noise: Any) -> None:
    single, eightfold = model_of(family, 1.0), model_of(family, W)
    exact = float(terms_of(single, rank_guide(single), noise)["kl"]["total"])
    found = {}
    for model in (single, eightfold):
        prior, guide = joint_equal(model, rank_guide(model))
        elbo = lrvd.RankELBO(noise=noise)
        draws = []
        for _ in range(400):
            loss = elbo.loss(prior, guide, x=torch.zeros(4))
            assert loss == pytest.approx(float(elbo.terms["kl"]["joint"]))
            draws.append(loss)
        found[model] = torch.tensor(draws)
    mean, error = float(found[eightfold].mean()), float(found[eightfold].std()) / 20
    assert abs(mean - W * exact) < 5 * error
    mean, error = float(found[single].mean()), float(found[single].std()) / 20
    assert abs(mean - exact) < 5 * error
    assert abs(mean - W * exact) > 5 * W * error  # the twin: counted once


@MODELS
def test_log_densities_and_draws_do_not_change(family: Any) -> None:
    single, eightfold = model_of(family, 1.0), model_of(family, W)
    latents = {name: value + 0.5 for name, value in single.start().items()}
    torch.testing.assert_close(single.log_prior(latents), eightfold.log_prior(latents))
    for one, other in zip(
        *(poutine.trace(m.draw).get_trace().nodes.values() for m in (single, eightfold))
    ):
        assert one["type"] != "sample" or torch.equal(one["value"], other["value"])
    drawn = []
    for model in (single, eightfold):
        torch.manual_seed(3)
        drawn.append(rank_guide(model)())
    torch.testing.assert_close(drawn[0], drawn[1])


def two_multiplicities(space: Any) -> Tensor:
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(1), 1.0).to_event(1))
    return scale * LogUniform(W).sample("z", space.size)


@NOISE
def test_a_joint_guide_over_two_multiplicities_is_refused(noise: Any) -> None:
    model = GateLoRA(bert(r=2), prior=two_multiplicities, num_data=60)
    with pytest.raises(ValueError, match=r"joint guide covers sites of the multipl"):
        terms_of(model, guides.multivariate_normal(model), noise)
    kl = terms_of(model, RankDiagonal(model), noise)["kl"]
    once = RankDiagonal(GateLoRA(bert(r=2), num_data=60)).distributions()["gate"]
    gate = kl_divergence(once, distributions.LogUniform()).sum().detach()
    torch.testing.assert_close(kl["z"], W * gate)
    scale = kl_divergence(
        RankDiagonal(model).distributions()["scale"], dist.LogNormal(0.0, 1.0)
    )
    torch.testing.assert_close(kl["scale"], scale.sum().detach())
