"""ARD: the learned variances and what they cost."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from nets import bert, regression
from pyro.infer import SVI
from torch import Tensor
from torch.distributions import kl_divergence

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.normal import Normal as Gaussian
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.priors.gaussian import ARD, Normal


def divergence_of(model: GateLoRA, guide: RankDiagonal) -> Tensor:
    """KL(guide || prior), without the network."""
    elbo = lrvd.RankELBO(noise="batch")
    loss: Tensor = elbo.differentiable_loss(lambda: model.draw(), guide)
    return loss


def minimize(objective: Callable[[], Tensor], *parameters: Tensor) -> float:
    """The minimum over the parameters, by L-BFGS."""
    search = torch.optim.LBFGS(
        parameters, lr=0.5, max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14
    )

    def closure() -> float:
        search.zero_grad()
        loss = objective()
        loss.backward(inputs=parameters)
        return float(loss.detach())

    search.step(closure)
    return float(objective().detach())


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 3.0])
def test_ard_at_its_best_gamma_costs_half_log_of_one_plus_one_over_alpha(
    log_alpha: float,
) -> None:
    model = GateLoRA(regression(), prior=ARD(), num_data=9, likelihood=Gaussian())
    guide = RankDiagonal(model, init_log_alpha=log_alpha)
    log_gamma = model.prior.log_gamma
    least = minimize(lambda: divergence_of(model, guide), log_gamma)
    alpha = math.exp(log_alpha)
    assert least == pytest.approx(3 * 0.5 * math.log1p(1 / alpha), rel=1e-8)
    torch.testing.assert_close(
        log_gamma.detach(), torch.full((3,), math.log1p(alpha)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("prior_scale", [0.5, 1.0, 3.0])
def test_a_normal_prior_with_learned_means_is_ard(prior_scale: float) -> None:
    """Minimized over one factor of mean and noise, which A and B undo for nothing."""
    prior = Normal(prior_scale)
    model = GateLoRA(regression(), prior=prior, num_data=9, likelihood=Gaussian())
    guide = RankDiagonal(model, learn_mean=True)
    log_alpha = torch.tensor([-4.0, 0.0, 2.0])
    log_factor = torch.zeros(3, requires_grad=True)

    def objective() -> Tensor:
        family = guide.families["gate"]
        q = family.posterior(log_factor.exp(), log_alpha + 2 * log_factor)
        p: Any = model.latent_sites()["gate"]
        return kl_divergence(q, p.base_dist).sum()

    least = minimize(objective, log_factor)
    expected = 0.5 * torch.log1p(torch.exp(-log_alpha))
    assert least == pytest.approx(float(expected.sum()), rel=1e-8)
    with torch.no_grad():  # the guide's own parameters give the same
        guide.loc.copy_(log_factor.exp())
        guide.log_variance.copy_(log_alpha + 2 * log_factor)
        torch.testing.assert_close(guide.log_alpha, log_alpha)
        assert float(divergence_of(model, guide)) == pytest.approx(least, rel=1e-8)


@pytest.mark.parametrize("driver", ["svi", "torch"])
def test_ards_variances_train_to_their_optimum(driver: str) -> None:
    model = GateLoRA(regression(), prior=ARD(), num_data=9, likelihood=Gaussian())
    guide = RankDiagonal(model, init_log_alpha=0.0).requires_grad_(False)
    x = torch.randn(9, 5)
    batch = {"x": x, "labels": x[:, 0]}
    options = {"lr": 0.03}
    if driver == "svi":
        svi = SVI(model, guide, lrvd.optim.AdamW(**options), loss=lrvd.RankELBO())
        step = partial(svi.step, **batch)
    else:
        loss = lrvd.RankELBO()(model, guide)
        optim = torch.optim.Adam(lrvd.optim.parameter_groups(model, guide), **options)

        def step() -> None:
            optim.zero_grad()
            loss(**batch).backward()
            optim.step()

    for _ in range(300):
        step()
    best = torch.log1p(guide.log_alpha.exp())
    assert best.max() > 0.1  # the start, 0, is not the optimum
    torch.testing.assert_close(model.prior.log_gamma.detach(), best, rtol=0, atol=0.01)


def test_one_ard_is_for_one_model() -> None:
    prior = ARD()
    GateLoRA(bert(), prior=prior, num_data=60)
    with pytest.raises(ValueError, match=r"'GateLoRA_\d+.prior' already; .*=ARD\(\)"):
        GateLoRA(bert(), prior=prior, num_data=60)
