"""The adapted network as a generative program."""

from typing import Any

import pyro
import pytest
import torch
from nets import bert, perceptron, regression, tokens
from pairs import rank_guide
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.likelihoods.normal import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA

BOTH = [GateLoRA, FactorLoRA]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BOTH)
def test_with_b_zero_the_network_is_the_base_bit_for_bit(
    family: Any, dtype: Any
) -> None:
    net = bert(randomize=False).to(dtype)
    batch = tokens(labels=False)
    with torch.no_grad(), net.disable_adapter():
        base = net(**batch).logits
    model = family(net, num_data=60)
    guide = rank_guide(model, init_log_alpha=2.0)
    with torch.no_grad():
        assert torch.equal(net(**batch).logits, base)
        with lrvd.posterior_sample(model, guide, seed=1) as bound:
            assert torch.equal(bound(**batch).logits, base)
        with lrvd.inference.PerExample(6):
            assert torch.equal(
                poutine.replay(model, poutine.trace(guide).get_trace())(**batch), base
            )


def test_with_noise_on_b_the_base_is_kept_at_the_posterior_mean_only() -> None:
    net = bert(randomize=False)
    batch = tokens(labels=False)
    base = net(**batch).logits
    model = FactorLoRA(net, num_data=60, sides=("lora_A", "lora_B"))
    guide = rank_guide(model, init_log_alpha=2.0)
    with lrvd.posterior_mean(model, guide):
        assert torch.equal(net(**batch).logits, base)
    with lrvd.posterior_sample(model, guide, seed=1):
        assert not torch.equal(net(**batch).logits, base)


def test_gate_noise_has_covariance_b_diag_alpha_ax2_bt() -> None:
    net = regression(features=5, r=3, outputs=4)
    layer = net.base_model.model.linear
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    x = torch.randn(1, 5)
    model = GateLoRA(net, num_data=10)
    guide = rank_guide(model)
    with torch.no_grad():
        guide.log_variance.copy_(torch.tensor([-1.0, 0.0, 1.0]))
        A /= (A @ x[0]).norm()  # so that the covariance is large beside atol
        B /= B.norm()
    h = (A @ x[0]).detach()
    law = B @ torch.diag(guide.log_alpha.exp() * h**2) @ B.T

    def spread(x: Tensor, count: int = 20_000) -> Tensor:
        with torch.no_grad(), lrvd.inference.PerExample(count):
            gates = guide()["gate"]
        with torch.no_grad(), model.bind(gates):
            return torch.cov(net(x.expand(count, -1)).T)

    torch.testing.assert_close(spread(x), law.detach(), rtol=0.1, atol=0.02)
    # the twin: another alpha does not pass
    with torch.no_grad():
        guide.log_variance += 0.5
    assert not torch.allclose(spread(x), law.detach(), rtol=0.1, atol=0.02)
    orthogonal = torch.linalg.svd(A.detach()).Vh[3:4]
    assert spread(orthogonal).abs().max() < 1e-24


def test_rows_of_a_take_gaussian_noise_with_one_scale_per_rank() -> None:
    net = regression(features=5, r=3)
    model = FactorLoRA(net, num_data=10)
    guide = rank_guide(model)
    with torch.no_grad():
        guide.log_variance.copy_(torch.tensor([-2.0, 0.0, 1.0]))
    draws = torch.stack([guide()["factor"] for _ in range(4000)]).view(-1, 3, 5)
    A = net.base_model.model.linear.lora_A.default.weight
    torch.testing.assert_close(draws.mean(0), A, rtol=0, atol=0.15)
    scales = draws.std(0).mean(1)
    torch.testing.assert_close(
        scales, (guide.log_variance / 2).exp(), rtol=0.05, atol=0.0
    )


def test_svi_recovers_the_conjugate_posterior() -> None:
    """A and B fixed, Normal prior and noise: the posterior of the gates is known."""
    torch.manual_seed(3)
    net = regression(features=4, r=3)
    for p in net.parameters():
        p.requires_grad_(False)
    layer = net.base_model.model.linear
    x = torch.randn(40, 4)
    design = (x @ layer.lora_A.default.weight.T) * layer.lora_B.default.weight[0]
    basis = torch.linalg.qr(
        design
    ).Q  # orthogonal, so that the diagonal family is exact
    layer.lora_A.default.weight.data = torch.linalg.lstsq(x, basis).solution.T
    layer.lora_B.default.weight.data = torch.ones(1, 3) * 6
    design = 6 * x @ layer.lora_A.default.weight.T
    y = torch.randn(40) + x @ layer.base_layer.weight[0]
    noise = Normal(0.7)
    noise.scale_unconstrained.requires_grad_(False)

    def prior(space: Any) -> Tensor:
        return pyro.sample(
            "gate", dist.Normal(torch.zeros(space.size), 1.0).to_event(1)
        )

    model = GateLoRA(net, prior=prior, likelihood=noise, num_data=40)
    guide = rank_guide(model, learn_mean=True)
    optim = lrvd.optim.AdamW(variational_lr=0.05, schedule=lambda s: 0.998**s)
    svi = SVI(model, guide, optim, loss=lrvd.RankELBO(num_particles=2))
    for _ in range(1500):
        svi.step(x=x, labels=y)
    target = y - x @ layer.base_layer.weight[0]
    precision = design.T @ design / 0.49 + torch.eye(3)
    mean = torch.linalg.solve(precision, design.T @ target / 0.49)
    off = precision - precision.diag().diag()
    assert off.abs().max() < 0.05 * precision.diag().min(), (
        "the design is not orthogonal"
    )
    torch.testing.assert_close(guide.loc.detach(), mean, rtol=0, atol=0.03)
    sd = (guide.log_variance / 2).exp().detach()
    torch.testing.assert_close(sd, precision.diag() ** -0.5, rtol=0.08, atol=0.0)


def test_a_scale_is_vacuous_without_a_weight_prior() -> None:
    """Gates times s and B over s give one likelihood: only a prior on B tells them."""
    net = regression()
    model = GateLoRA(net, num_data=10)
    x, s = torch.randn(4, 5), 3.0
    with model.space.bind(torch.ones(3)):
        before = net(x)
    with torch.no_grad():
        net.base_model.model.linear.lora_B.default.weight /= s
    with model.space.bind(torch.full((3,), s)):
        torch.testing.assert_close(net(x), before)


def test_product_priors_still_show_a_gate() -> None:
    def prior(space: Any) -> Tensor:
        scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(1)).to_event(1))
        return scale * pyro.sample(
            "z", dist.Normal(torch.ones(space.size), 1.0).to_event(1)
        )

    model = GateLoRA(bert(), prior=prior, num_data=60)
    with lrvd.inference.PerExample(6):
        trace = poutine.trace(model).get_trace(**tokens())
    gate = trace.nodes["gate"]
    assert gate["value"].shape == (6, model.space.size)
    torch.testing.assert_close(
        gate["value"], trace.nodes["scale"]["value"] * trace.nodes["z"]["value"]
    )


def test_a_name_alone_does_not_make_a_weight_prior() -> None:
    def guide(**batch: Any) -> None:
        pass

    def model(x: Tensor) -> None:
        pyro.sample("weight_prior", dist.Normal(0.0, 1.0), obs=x.sum())

    elbo = lrvd.RankELBO()
    elbo.loss(model, guide, x=torch.zeros(2))
    assert "weight_prior" not in elbo.terms and "log_likelihood" in elbo.terms


@pytest.mark.parametrize(
    "make",
    [
        lambda: dist.Normal(0.0, 0.3),
        lambda: dist.Normal(0.2, 0.3),
        lambda: dist.Normal(torch.zeros(1), torch.full((1,), 0.3)),
        lambda: dist.Laplace(0.0, 0.3),
    ],
)
def test_the_weight_prior_is_the_density_of_all_elements(make: Any) -> None:
    prior = make()
    model = GateLoRA(perceptron(), num_data=12, weight_prior=prior)
    weights = model.space.weights("lora_A") + model.space.weights("lora_B")
    expected = torch.stack([prior.log_prob(w).sum() for w in weights]).sum()
    with poutine.trace() as run, torch.random.fork_rng():
        model.draw()
    found = run.trace.nodes["weight_prior"]["fn"].log_factor
    near: Any = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(found, expected, **near)
    slopes = (torch.autograd.grad(x, weights) for x in (found, expected))
    torch.testing.assert_close(*slopes, **near)
