"""Which gauge of A and B a posterior over rank components prefers, and which none.

A linear teacher ``y = B A x + noise`` has A and B known and fixed. Every objective is
then quadratic in the gates, and its optimum is known. Rotating the factors, A -> Q A
and B -> B Q^T, leaves the function. In the gauge of the whitened update's singular
vectors, K = B^T B = N^-1 A X^T X A^T is diagonal. The gates' Gram matrix is
N K * K / sd^2, elementwise. By Hadamard's inequality ``prod K_ii >= det K``, and by
Oppenheim's ``det(K * K) >= (det K)^2``. So diagonal and full covariances of the gates
both want K diagonal.
"""

import math
from collections.abc import Callable
from typing import Any

import pyro
import pytest
import torch
from nets import bert, regression, tokens
from pyro import distributions as dist
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.distributions import dawson, log_uniform_kl
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.base import data_plate
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.priors.gaussian import Normal
from lrvd_pyro.priors.hierarchical import Horseshoe
from lrvd_pyro.priors.log_uniform import LogUniform

N, INPUTS, OUTPUTS, R, SD = 100, 6, 5, 4, 0.5
SIZES = torch.tensor([2.0, 0.9, 0.4, 0.15], dtype=torch.float64)
Factors = tuple[Tensor, Tensor]
Objective = Callable[[Factors], Tensor]


def orthogonal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(draw).Q


def inputs() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(N, INPUTS, generator=generator, dtype=torch.float64)
    return x * torch.linspace(0.5, 2.0, INPUTS, dtype=torch.float64)


X = inputs()
VALUES, VECTORS = torch.linalg.eigh(X.T @ X / N)
WHITEN = VECTORS @ VALUES.rsqrt().diag() @ VECTORS.T
# the gauge of the singular vectors of the whitened update
A0 = SIZES.sqrt().diag() @ orthogonal(INPUTS, R, seed=3).T @ WHITEN
B0 = orthogonal(OUTPUTS, R, seed=4) @ SIZES.sqrt().diag()
CLEAN = X @ A0.T @ B0.T
GENERATOR = torch.Generator().manual_seed(7)
NOISE = torch.randn(N, OUTPUTS, generator=GENERATOR, dtype=torch.float64)
Y = CLEAN + SD * NOISE


def rotated(by: Tensor) -> Factors:
    """A and B in another gauge; the update B A stays."""
    return by @ A0, B0 @ by.T


def gram(factors: Factors) -> Tensor:
    """The precision that the data give to the gates, R x R."""
    A, B = factors
    return (B.T @ B) * (A @ X.T @ X @ A.T) / SD**2


def misfit(labels: Tensor = Y) -> float:
    """The negative log likelihood at gates 1."""
    constant = 0.5 * Y.numel() * math.log(2 * math.pi * SD**2)
    return constant + float((labels - CLEAN).square().sum()) / (2 * SD**2)


def best_log_alpha(prior: Any, precision: Tensor) -> Tensor:
    """Where ``precision alpha / 2 + KL(N(1, alpha) || prior)`` is least."""
    if isinstance(prior, Normal):
        return -torch.log1p(precision)
    low, high = torch.full((R,), -14.0), torch.full((R,), 14.0)
    for _ in range(60):
        middle = (low + high) / 2
        u = torch.exp(-0.5 * (middle + math.log(2)))
        falls = 0.5 * precision * middle.exp() < u * dawson(u)
        low, high = torch.where(falls, middle, low), torch.where(falls, high, middle)
    return middle


def held_diagonal(prior: Any) -> Objective:
    """The optimum over N(1, alpha) for each gate."""

    def objective(factors: Factors) -> Tensor:
        precision = gram(factors).diagonal()
        log_alpha = best_log_alpha(prior, precision.detach())
        alpha = log_alpha.exp()
        kl = 0.5 * (alpha - log_alpha)
        if isinstance(prior, LogUniform):
            kl = log_uniform_kl(log_alpha)
        return misfit() + (0.5 * precision * alpha + kl).sum()

    return objective


def negative_log_evidence(precision: Tensor, slope: Tensor) -> Tensor:
    """Of Gaussian data linear in weights ~ N(0, 1)."""
    posterior = torch.eye(len(slope)) + precision
    fit = slope @ torch.linalg.solve(posterior, slope) - Y.square().sum() / SD**2
    constant = 0.5 * Y.numel() * math.log(2 * math.pi * SD**2)
    return constant - 0.5 * fit + 0.5 * posterior.logdet()


def full_gates(factors: Factors) -> Tensor:
    """The optimum over Gaussians of any mean and covariance of the gates.

    The optimum is in expectation over the noise of the labels, which free means would
    fit in part. The gauge that suits one draw of it best lies elsewhere, however many
    data there are.
    """
    precision = gram(factors)
    posterior, truth = torch.eye(R) + precision, torch.ones(R)
    known = precision @ truth
    fit = known @ torch.linalg.solve(posterior, known) - truth @ known
    fit = fit + torch.linalg.solve(posterior, precision).trace() - Y.numel()
    constant = 0.5 * Y.numel() * math.log(2 * math.pi * SD**2)
    return constant - 0.5 * fit + 0.5 * posterior.logdet()


def diagonal_gates(factors: Factors) -> Tensor:
    """The optimum over Gaussians of any mean and diagonal covariance."""
    posterior = torch.eye(R) + gram(factors)
    gap = 0.5 * (posterior.diagonal().log().sum() - posterior.logdet())
    return full_gates(factors) + gap


def full_core(factors: Factors) -> Tensor:
    """The optimum over Gaussians of any mean and covariance of the whole core C."""
    A, B = factors
    precision = torch.kron(B.T @ B, A @ X.T @ X @ A.T) / SD**2
    return negative_log_evidence(precision, (B.T @ Y.T @ X @ A.T).reshape(-1) / SD**2)


OBJECTIVES: dict[str, Objective] = {
    "LogUniform, mean 1": held_diagonal(LogUniform()),
    "Normal, mean 1": held_diagonal(Normal()),
    "Normal, diagonal covariance": diagonal_gates,
    "Normal, full covariance": full_gates,
}
objectives = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@objectives
def test_every_objective_over_gates_changes_with_the_gauge(
    objective: Objective,
) -> None:
    first = float(objective(rotated(torch.eye(R))))
    others = [objective(rotated(orthogonal(R, R, seed=s))) for s in range(10, 20)]
    assert all(float(other) > first + 0.2 for other in others)  # nats
    assert len({round(float(other), 6) for other in others}) == 10


def test_a_free_covariance_over_the_whole_core_does_not_see_the_gauge() -> None:
    first = float(full_core(rotated(torch.eye(R))))
    for seed in range(10, 20):
        other = float(full_core(rotated(orthogonal(R, R, seed=seed))))
        assert other == pytest.approx(first, abs=1e-8)


def alignment(rotation: Tensor) -> float:
    """1 if each component is one singular pair, whatever their order and signs."""
    return float(rotation.abs().amax(1).min())


@objectives
def test_the_best_gauge_is_the_svd_of_the_whitened_update(objective: Objective) -> None:
    least, aligned = [], []
    for seed in (20, 21, 22):
        start = orthogonal(R, R, seed=seed)
        assert alignment(start) < 0.95
        generator = torch.zeros(R, R, requires_grad=True)

        def turn(generator: Tensor = generator, start: Tensor = start) -> Tensor:
            return torch.matrix_exp(generator - generator.T) @ start

        search = torch.optim.LBFGS(
            [generator], max_iter=300, line_search_fn="strong_wolfe"
        )

        def closure(search: Any = search) -> Tensor:
            search.zero_grad()
            loss = objective(rotated(turn()))
            loss.backward()
            return loss.detach()

        search.step(closure)
        least.append(float(objective(rotated(turn())).detach()))
        aligned.append(alignment(turn().detach()))
    best = min(range(3), key=lambda i: least[i])
    assert aligned[best] > 0.99
    assert least[best] <= float(objective(rotated(torch.eye(R)))) + 1e-6


class VectorNormal(lrvd.likelihoods.Normal):
    """Gaussian labels of several dimensions, of known noise."""

    def forward(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        with data_plate(len(predictions), labels, num_data):
            pyro.sample("labels", dist.Normal(predictions, SD).to_event(1), obs=labels)


def fitted(prior: Any, factors: Factors) -> tuple[Tensor, float, float]:
    """The library's log alpha and objective, by SVI, with its standard error."""
    net = regression(INPUTS, R, OUTPUTS)
    linear = net.base_model.model.linear
    with torch.no_grad():
        linear.base_layer.weight.zero_()
        for side, weight in zip((linear.lora_A, linear.lora_B), factors):
            side.default.weight.copy_(weight)
            side.default.weight.requires_grad_(False)
        assert torch.allclose(net(X), CLEAN)  # in every gauge
    model = GateLoRA(net, prior=prior, likelihood=VectorNormal(), num_data=N)
    guide = RankDiagonal(model)
    elbo = lrvd.RankELBO()
    passed = []
    for lr in (0.1, 0.02):
        optim = lrvd.optim.AdamW(lr=lr, variational_lr=lr)
        svi = SVI(model, guide, optim, loss=elbo)
        for _ in range(150):
            svi.step(x=X, labels=CLEAN)
            passed.append(guide.log_variance.detach().clone())
    with torch.no_grad():
        guide.log_variance.copy_(torch.stack(passed[150:]).mean(0))
    losses = torch.tensor([svi.evaluate_loss(x=X, labels=CLEAN) for _ in range(400)])
    return guide.log_alpha, float(losses.mean()), float(losses.std()) / 20


@pytest.mark.parametrize(
    "prior", [LogUniform(), Normal()], ids=["LogUniform", "Normal"]
)
def test_the_librarys_objective_is_this_one_in_either_gauge(prior: Any) -> None:
    """On labels without noise, which leave the objective and lessen SVI's."""
    objective, noise = held_diagonal(prior), misfit() - misfit(CLEAN)
    for rotation in (torch.eye(R), orthogonal(R, R, seed=13)):
        log_alpha, mean, error = fitted(prior, rotated(rotation))
        best = best_log_alpha(prior, gram(rotated(rotation)).diagonal())
        torch.testing.assert_close(log_alpha, best, rtol=0, atol=0.1)
        exact = float(objective(rotated(rotation))) - noise
        assert abs(mean - exact) < 5 * error + 0.02
    svd = float(objective(rotated(torch.eye(R)))) - noise
    assert abs(mean - svd) > 5 * error + 0.02  # the twin: another gauge's optimum


def horseshoe(scale: float, weight_prior: Any) -> tuple[GateLoRA, RankDiagonal]:
    torch.manual_seed(5)
    model = GateLoRA(
        bert(), prior=Horseshoe(scale), num_data=60, weight_prior=weight_prior
    )
    return model, RankDiagonal(model)


def loss_of(model: GateLoRA, guide: RankDiagonal) -> tuple[float, dict[str, Any]]:
    torch.manual_seed(6)
    elbo = lrvd.RankELBO()
    return elbo.loss(model, guide, **tokens()), elbo.terms


@pytest.mark.parametrize("weighted", [False, True])
def test_a_global_scale_is_vacuous_unless_the_weights_have_a_prior(
    weighted: bool,
) -> None:
    """B / s with the scale's posterior, or that and its prior, times s."""
    s = 3.0
    weight_prior = dist.Normal(0.0, 1.0) if weighted else None
    loss, terms = loss_of(*horseshoe(1.0, weight_prior))
    found = {}
    for prior_scale in (1.0, s):
        model, guide = horseshoe(prior_scale, weight_prior)
        with torch.no_grad():
            for B in model.space.weights("lora_B"):
                B /= s
            guide.loc[0] += math.log(s)  # of global_scale, the first site
        found[prior_scale] = loss_of(model, guide)
    same_prior, scaled_prior = found[1.0][1]["kl"], found[s][1]["kl"]
    for new in found.values():
        torch.testing.assert_close(new[1]["log_likelihood"], terms["log_likelihood"])
    changed = {
        n for n, kl in same_prior.items() if not torch.allclose(kl, terms["kl"][n])
    }
    assert changed == {"global_scale", "total"}
    torch.testing.assert_close(scaled_prior, terms["kl"])
    if weighted:
        assert abs(found[s][0] - loss) > 1.0
    else:
        assert found[s][0] == pytest.approx(loss, rel=1e-12)
