"""RankELBO against programs whose evidence or ELBO is known in closed form."""

import math
from typing import Any

import pyro
import pytest
import torch
from nets import regression
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor
from torch.distributions import constraints
from toys import (
    FEATURES,
    LABELS,
    SD,
    B,
    N,
    R,
    batches,
    estimate,
    flat_elbo,
    flat_guide,
    flat_model,
    hierarchical_guide,
    hierarchical_model,
    regress,
)

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.models import GateLoRA


@pytest.mark.parametrize("kl_weight", [1.0, 3.0])
@pytest.mark.parametrize("noise", ["example", "batch"])
def test_loss_is_unbiased_for_the_elbo_of_all_data(
    noise: Any, kl_weight: float
) -> None:
    fit, kl = flat_elbo()
    elbo = lrvd.RankELBO(noise=noise, kl_weight=kl_weight)
    mean, error = estimate(elbo, flat_model, flat_guide, 1500)
    assert abs(mean - (kl_weight * kl - fit)) < 5 * error
    # the twin: counting the KL once per example is told apart
    assert abs(mean - (B * kl_weight * kl - fit)) > 5 * error


@pytest.mark.parametrize("kl_weight", [1.0, 3.0])
def test_loss_of_a_single_gate_is_unbiased(kl_weight: float) -> None:
    def model(x: Tensor, labels: Tensor | None = None) -> None:
        gate = pyro.sample("gate", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        regress(gate, x[:, :1], labels)

    def guide(x: Tensor, labels: Tensor | None = None) -> None:
        pyro.sample("gate", dist.Normal(torch.ones(1), 0.5).to_event(1))

    x = FEATURES[:, 0]
    fit = -0.5 * ((LABELS - x) ** 2 + 0.25 * x**2) / SD**2 - math.log(SD)
    fit = float((fit - 0.5 * math.log(2 * math.pi)).sum())
    kl = 0.5 * (0.25 + 1 - 1) - math.log(0.5)
    mean, error = estimate(lrvd.RankELBO(kl_weight=kl_weight), model, guide, 1500)
    assert abs(mean - (kl_weight * kl - fit)) < 5 * error


@pytest.mark.parametrize("kl_weight", [1.0, 3.0])
def test_hierarchy_is_drawn_per_example_without_bias(kl_weight: float) -> None:
    per_example = lrvd.RankELBO(kl_weight=kl_weight)
    per_batch = lrvd.RankELBO(kl_weight=kl_weight, noise="batch")
    one, e1 = estimate(per_example, hierarchical_model, hierarchical_guide, 2000)
    two, e2 = estimate(per_batch, hierarchical_model, hierarchical_guide, 2000)
    assert abs(one - two) < 5 * math.hypot(e1, e2)


def test_it_agrees_with_pyros_trace_elbo() -> None:
    for model, guide in (
        (flat_model, flat_guide),
        (hierarchical_model, hierarchical_guide),
    ):
        ours, e1 = estimate(lrvd.RankELBO(), model, guide, 1500)
        batch = batches(1500)
        losses = torch.tensor([Trace_ELBO().loss(model, guide, **b) for b in batch])
        error = math.hypot(e1, float(losses.std() / len(batch) ** 0.5))
        assert abs(ours - float(losses.mean())) < 5 * error


def test_every_level_of_a_hierarchy_has_one_draw_per_example() -> None:
    with PerExample(B), poutine.trace() as run:
        hierarchical_guide(FEATURES[:B])
    shapes = {name: tuple(s["value"].shape) for name, s in run.trace.nodes.items()}
    assert shapes == {"top": (B, 1), "group": (B, 2), "gate": (B, R)}
    for name, rows in shapes.items():
        assert len(run.trace.nodes[name]["value"].unique(dim=0)) == rows[0]


def test_density_per_example_sums_to_its_mean() -> None:
    with PerExample(B), poutine.trace() as run:
        flat_guide(FEATURES[:B])
    site = run.trace.nodes["gate"]
    run.trace.compute_log_prob()
    expected = site["fn"].log_prob(site["value"]).mean()
    torch.testing.assert_close(site["log_prob_sum"], expected)


def test_the_exact_posterior_has_the_evidence_at_every_draw() -> None:
    """With Trace_ELBO's estimator the loss at q = posterior has no variance."""
    precision = FEATURES.T @ FEATURES / SD**2 + torch.eye(R) / 4
    covariance = precision.inverse()
    mean = covariance @ (FEATURES.T @ LABELS / SD**2 + torch.ones(R) / 4)

    def posterior(x: Tensor, labels: Tensor | None = None) -> None:
        pyro.sample("gate", dist.MultivariateNormal(mean, covariance))

    evidence = dist.MultivariateNormal(
        FEATURES.sum(1), 4 * FEATURES @ FEATURES.T + SD**2 * torch.eye(N)
    ).log_prob(LABELS)
    elbo = lrvd.RankELBO(noise="batch")
    with pytest.warns(UserWarning, match="no closed form of KL"):
        first = elbo.loss(flat_model, posterior, x=FEATURES, labels=LABELS)
    again = [elbo.loss(flat_model, posterior, x=FEATURES, labels=LABELS) for _ in "123"]
    torch.testing.assert_close(torch.tensor([first, *again]), -evidence.expand(4))


def test_terms_add_up_to_the_loss_and_are_tensors() -> None:
    elbo = lrvd.RankELBO(kl_weight=0.5, num_particles=3)
    loss = elbo.differentiable_loss(
        hierarchical_model, hierarchical_guide, x=FEATURES, labels=LABELS
    )
    terms = elbo.terms
    assert terms["kl"].keys() == {"total", "top", "group", "gate"}
    parts = [v for k, v in terms["kl"].items() if k != "total"]
    torch.testing.assert_close(sum(parts), terms["kl"]["total"])
    total = terms["kl_weight"] * terms["kl"]["total"] - terms["log_likelihood"]
    torch.testing.assert_close(loss.detach(), total)
    assert not any(t.requires_grad for t in [*parts, terms["log_likelihood"]])


def test_one_gate_per_example_has_less_variance_at_large_noise() -> None:
    """The gradient for log alpha over random batches, against one draw per batch."""
    ratio = {}
    net = regression(features=5, r=R)
    x = torch.randn(96, 5)
    y = (net(x).squeeze(1) + torch.randn(96)).detach()
    for log_alpha in (-4.0, 0.0, 2.0, 4.0):
        variance = {}
        for noise in ("example", "batch"):
            model = GateLoRA(net, num_data=96, likelihood=lrvd.likelihoods.Normal())
            guide = RankDiagonal(model, init_log_alpha=log_alpha)
            elbo = lrvd.RankELBO(noise=noise)  # type: ignore[arg-type]
            gradients = []
            for _ in range(400):
                rows = torch.randperm(96)[:8]
                loss = elbo.differentiable_loss(model, guide, x=x[rows], labels=y[rows])
                gradients += torch.autograd.grad(loss, [guide.log_variance])
            variance[noise] = torch.stack(gradients).var(0)
        ratio[log_alpha] = float((variance["example"] / variance["batch"]).median())
    assert ratio[-4.0] < 1.5 and ratio[0.0] < 1.3, ratio
    assert ratio[2.0] < 0.75 and ratio[4.0] < 0.75, ratio


def test_positive_constraint_of_learned_noise_trains() -> None:
    net = regression()
    model = GateLoRA(net, num_data=20, likelihood=lrvd.likelihoods.Normal(3.0))
    guide = RankDiagonal(model)
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    x = torch.randn(20, 5)
    for _ in range(100):
        svi.step(x=x, labels=torch.zeros(20))
    assert float(model.likelihood.scale.detach()) < 3.0
    assert constraints.positive.check(model.likelihood.scale)


def plated_model(x: Tensor, labels: Tensor | None = None) -> None:
    """The gates of `flat_model`, in a plate of three beside an event of two."""
    with pyro.plate("groups", 3, dim=-1):
        gate = pyro.sample("gate", dist.Normal(torch.ones(2), 2.0).to_event(1))
    regress(gate.flatten(-2), x, labels)


def plated_guide(x: Tensor, labels: Tensor | None = None) -> None:
    loc, scale = torch.linspace(-1, 1, R), torch.linspace(0.3, 0.9, R)
    normal = dist.Normal(loc.view(3, 2), scale.view(3, 2)).to_event(1)
    with pyro.plate("groups", 3, dim=-1):
        pyro.sample("gate", normal)


def test_examples_stand_left_of_the_plates_of_a_program() -> None:
    with PerExample(B), poutine.trace() as run:
        plated_guide(FEATURES[:B])
        with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
            pyro.sample("pairs", dist.Normal(torch.zeros(3), 1.0))
    run.trace.compute_log_prob()
    for name, shape in (("gate", (B, 3, 2)), ("pairs", (B, 4, 3))):
        site = run.trace.nodes[name]
        assert tuple(site["value"].shape) == shape
        assert len(site["value"].unique(dim=0)) == B
        total = site["fn"].log_prob(site["value"]).sum()
        torch.testing.assert_close(site["log_prob_sum"], total / B)


def test_loss_of_gates_in_a_plate_is_unbiased() -> None:
    expected = flat_elbo()
    mean, error = estimate(lrvd.RankELBO(), plated_model, plated_guide, 1500)
    assert abs(mean - (expected[1] - expected[0])) < 5 * error
