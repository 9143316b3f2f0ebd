"""Simulation-based calibration: the guides that SVI reaches, against the prior.

Predictions are linear in the gates and the noise is Gaussian, so that the exact
posterior is Gaussian, its covariance the same for all data, and both guides hold it:
`RankDiagonal` on a design with orthogonal columns, where the gates are independent.
"""

import math
from typing import Any

import pyro
import pytest
import torch
from nets import regression
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.testing import assert_uniform_ranks, sbc_ranks

N, R, SD = 24, 3, 0.7
SIMULATIONS, DRAWS = 200, 63

pytestmark = pytest.mark.filterwarnings("ignore:no closed form")


def standard_normal(space: lrvd.RankSpace) -> Tensor:
    zeros = torch.zeros(space.size)
    return pyro.sample("gate", dist.Normal(zeros, 1.0).to_event(1))


class Problem:
    """A frozen linear network, its guide, and the exact posterior of the gates."""

    def __init__(self, family: str) -> None:
        net = regression(features=5, r=R).requires_grad_(False)
        likelihood = lrvd.likelihoods.Normal(SD).requires_grad_(False)
        self.model = GateLoRA(
            net, prior=standard_normal, likelihood=likelihood, num_data=N
        )
        (a,), (b,) = (self.model.space.weights(side) for side in ("lora_A", "lora_B"))
        if family == "diagonal":
            self.features = 2 * torch.linalg.qr(torch.randn(N, R)).Q
            self.guide: Any = RankDiagonal(self.model, learn_mean=True)
        else:
            self.features = 0.4 * (torch.randn(N, R) + torch.randn(N, 1))
            self.guide = AutoMultivariateNormal(self.model, init_scale=0.3)
        self.x = (self.features / b) @ torch.linalg.pinv(a).T
        self.offset = self.x @ net.base_model.model.linear.base_layer.weight.T
        precision = self.features.T @ self.features / SD**2 + torch.eye(R)
        self.covariance = precision.inverse()

    def exact_mean(self, labels: Tensor) -> Tensor:
        signal = self.features.T @ (labels - self.offset.squeeze(1)) / SD**2
        return self.covariance @ signal

    def simulate(self) -> tuple[Tensor, Tensor]:
        run = poutine.trace(self.model).get_trace(x=self.x)
        return run.nodes["gate"]["value"], run.nodes["labels"]["value"].detach()

    def train(self, labels: Tensor, steps: int, lr: float) -> None:
        """SVI from wherever the guide is now, with a rate that falls to zero."""
        optim = lrvd.optim.AdamW(
            variational_lr=lr,
            betas=(0.8, 0.95),
            schedule=lambda step: 0.5 + 0.5 * math.cos(math.pi * step / steps),
        )
        svi = SVI(self.model, self.guide, optim, loss=lrvd.RankELBO())
        for _ in range(steps):
            svi.step(x=self.x, labels=labels)

    def posterior(self) -> dist.MultivariateNormal:
        if isinstance(self.guide, RankDiagonal):
            scale = self.guide.log_variance.detach().mul(0.5).exp()
            return dist.MultivariateNormal(
                self.guide.loc.detach(), scale_tril=scale.diag()
            )
        normal = self.guide.get_posterior()
        return dist.MultivariateNormal(
            normal.loc.detach(), scale_tril=normal.scale_tril.detach()
        )

    def fit(self, labels: Tensor) -> Tensor:
        self.train(labels, steps=50, lr=0.3)
        return self.posterior().sample((DRAWS,))


@pytest.mark.parametrize("family", ["diagonal", "multivariate"])
def test_svi_reaches_the_exact_posterior(family: str) -> None:
    problem = Problem(family)
    _, labels = problem.simulate()
    problem.train(labels, steps=2000, lr=0.1)
    reached, sd = problem.posterior(), problem.covariance.diag().sqrt()
    error = (reached.loc - problem.exact_mean(labels)) / sd
    ratio = reached.covariance_matrix / torch.outer(sd, sd)
    assert error.abs().max() < 0.1
    exact = problem.covariance / torch.outer(sd, sd)
    torch.testing.assert_close(ratio, exact, atol=0.15, rtol=0)


@pytest.mark.parametrize("family", ["diagonal", "multivariate"])
def test_ranks_are_uniform_and_those_of_wrong_posteriors_are_not(family: str) -> None:
    problem = Problem(family)
    problem.train(problem.simulate()[1], steps=1000, lr=0.1)
    truths, fits = [], []

    def simulate() -> tuple[Tensor, Tensor]:
        truths.append(problem.simulate())
        return truths[-1]

    def fit(labels: Tensor) -> Tensor:
        fits.append(problem.fit(labels))
        return fits[-1]

    ranks = sbc_ranks(simulate, fit, SIMULATIONS, DRAWS)
    assert_uniform_ranks(ranks, DRAWS)

    def again(wrong: Any) -> Tensor:
        past, draws = iter(truths), map(wrong, fits)
        return sbc_ranks(lambda: next(past), lambda _: next(draws), len(fits), DRAWS)

    shift = problem.covariance.diag().sqrt()
    twins = [again(lambda z: z + shift), again(lambda z: z.mean(0).lerp(z, 0.6))]
    for ranks in twins:
        for latent in range(R):
            with pytest.raises(AssertionError, match="ranks are not uniform"):
                assert_uniform_ranks(ranks[:, [latent]], DRAWS)
