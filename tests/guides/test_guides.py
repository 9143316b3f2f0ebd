"""RankDiagonal: its parameters, its reports and its refusals."""

import math
from typing import Any

import pyro
import pytest
import torch
from families import PRIORS
from nets import bert, regression, tokens
from pairs import rank_guide
from pyro import distributions as dist
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal, TiedDiagonal
from lrvd_pyro.inference.per_example import PerExample
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.priors.hierarchical import Horseshoe


@pytest.mark.parametrize(
    ("family", "learn_mean", "count"),
    [(GateLoRA, False, 1), (GateLoRA, True, 2), (FactorLoRA, False, 1)],
)
def test_extra_parameters_are_r_or_2r(
    family: Any, learn_mean: bool, count: int
) -> None:
    model = family(bert(), num_data=60)
    options = {"learn_mean": True} if learn_mean else {}
    guide = rank_guide(model, **options)
    assert sum(p.numel() for p in guide.parameters()) == count * model.space.size


@pytest.mark.parametrize("sides", [(), ("lora_A",), ("lora_A", "lora_B")])
def test_log_alpha_starts_where_it_is_told(sides: Any) -> None:
    net = bert()
    model: Any = GateLoRA(net, num_data=60)
    if sides:
        model.space.close()
        model = FactorLoRA(net, num_data=60, sides=sides)
    guide = rank_guide(model, init_log_alpha=-2.0)
    torch.testing.assert_close(guide.log_alpha, torch.full((16,), -2.0))
    assert float(guide.effective_rank) == pytest.approx(16 / (1 + math.exp(-2)))
    ranks = guide.effective_ranks
    assert ranks.keys() == set(model.space.modules)
    assert sum(ranks.values()) == pytest.approx(float(guide.effective_rank))


def test_log_alpha_is_noise_over_signal_of_each_row() -> None:
    net = regression(features=5, r=3)
    guide = TiedDiagonal(FactorLoRA(net, num_data=9))
    A = net.base_model.model.linear.lora_A.default.weight.detach()
    expected = guide.log_variance.detach() + math.log(5) - A.square().sum(1).log()
    torch.testing.assert_close(guide.log_alpha, expected)


def test_log_alpha_of_a_learned_mean_is_relative_to_it() -> None:
    guide = RankDiagonal(GateLoRA(bert(), num_data=60), learn_mean=True)
    with torch.no_grad():
        guide.loc.fill_(-2.0)
    torch.testing.assert_close(guide.log_alpha, torch.full((16,), -4.0 - math.log(4)))


def test_a_bound_is_a_wall_and_not_a_trap() -> None:
    guide = RankDiagonal(GateLoRA(bert(), num_data=60))
    low, high = -10.0, 8.0
    with torch.no_grad():
        guide.log_variance[:2] = torch.tensor([low - 1, high + 1])
    torch.testing.assert_close(guide.log_alpha[:2], torch.tensor([low, high]))
    for sign, stays in ((1.0, [True, False]), (-1.0, [False, True])):
        with pyro.poutine.trace() as run:
            guide()
        scale = run.trace.nodes["gate"]["fn"].base_dist.scale
        (gradient,) = torch.autograd.grad(sign * scale.sum(), guide.log_variance)
        assert [float(g) == 0 for g in gradient[:2]] == stays


def test_kl_of_a_batch_does_not_grow_with_it() -> None:
    """The KL of parameters that the draw does not change is computed once."""
    model = FactorLoRA(bert(), num_data=60)
    guide = rank_guide(model)
    terms = []
    for size in (1, 6):
        elbo = lrvd.RankELBO()
        elbo.loss(model, guide, **tokens(size))
        terms.append(elbo.terms["kl"]["factor"])
    torch.testing.assert_close(terms[0], terms[1])


def in_the_unit_interval(space: Any) -> Tensor:
    share = torch.ones(space.size)
    return pyro.sample("gate", dist.Beta(share, share).to_event(1))


def test_a_site_that_is_neither_real_nor_positive_is_refused() -> None:
    model = GateLoRA(bert(), prior=in_the_unit_interval, num_data=60)
    with pytest.raises(TypeError, match=r"latent site 'gate' .*AutoNormal\(model\)"):
        RankDiagonal(model)
    guide = AutoNormal(model)
    with pytest.warns(UserWarning, match="no closed form"):
        lrvd.RankELBO().loss(model, guide, **tokens())


def test_other_models_and_learned_weights_are_refused() -> None:
    with pytest.raises(TypeError, match="needs gates, and PeftModel.* draws nothing"):
        RankDiagonal(bert())  # type: ignore[arg-type]
    factor, gate = FactorLoRA(bert(), num_data=60), GateLoRA(bert(), num_data=60)
    with pytest.raises(TypeError, match=r"FactorLoRA takes guides.TiedDiagonal\(mod"):
        RankDiagonal(factor)
    with pytest.raises(TypeError, match=r"GateLoRA takes guides.RankDiagonal\(model"):
        TiedDiagonal(gate)  # type: ignore[arg-type]


LEARN = pytest.mark.parametrize("learn_mean", [False, True])


@LEARN
@pytest.mark.parametrize("prior", PRIORS)
def test_every_prior_starts_at_gate_one_with_small_noise(
    prior: str, learn_mean: bool
) -> None:
    model = GateLoRA(bert(), prior=PRIORS[prior](), num_data=60)
    guide = RankDiagonal(model, learn_mean=learn_mean)
    error = 0.05 if prior == "SpikeSlab()" else 0.03
    torch.testing.assert_close(
        guide.mean().detach(), torch.ones(16), rtol=0, atol=error
    )
    assert (guide.log_alpha < -2.5).all()
    if list(model.latent_sites()) == ["gate"]:
        torch.testing.assert_close(guide.log_alpha, torch.full((16,), -4.0))


BLOCKS = 64
MANY_SITES = ["Horseshoe()", "Horseshoe(slab=2.0)", "Hierarchical()", "your own"]


@pytest.mark.parametrize("prior", [*MANY_SITES, "SpikeSlab()", "TruncatedLogUniform()"])
def test_mean_and_log_alpha_are_those_of_the_guides_own_draws(prior: str) -> None:
    model = GateLoRA(bert(), prior=PRIORS[prior](), num_data=60)
    guide = RankDiagonal(model, learn_mean=True)
    with torch.no_grad():
        guide.log_variance += torch.randn(len(guide.log_variance))
        guide.loc += 0.3 * torch.randn(len(guide.loc))
        with PerExample(BLOCKS * 4096):
            gates = model.value_at(guide()).reshape(BLOCKS, 4096, 16)
        means = gates.mean(1)
        log_alphas = (gates.var(1) / means.square()).log()
        center = gates.flatten(0, 1).mean(0)
        log_alpha = (gates.flatten(0, 1).var(0) / center.square()).log()
    exact = guide._is_product  # else the guide itself takes as many draws as a block
    widen = 1 / BLOCKS if exact else 1 + 1 / BLOCKS
    bound = 5 * math.sqrt(widen) * log_alphas.std(0)
    assert ((guide.log_alpha - log_alpha).abs() < bound).all()
    assert ((guide.mean() - center).abs() < 5 * math.sqrt(widen) * means.std(0)).all()
    assert exact == (prior not in ("Horseshoe(slab=2.0)", "SpikeSlab()"))
    # the twin: the noise of the last site alone, where that is not the gate
    (alone,) = [
        q for n, q in guide.distributions().items() if n == [*guide.families][-1]
    ]
    wrong = (alone.variance / alone.mean.square()).log().detach()
    if list(guide.families)[-1] != "gate":
        assert not ((wrong - log_alpha).abs() < bound).all()


def test_log_alpha_of_a_log_normal_gate_is_log_of_exp_v_minus_one() -> None:
    model = GateLoRA(bert(), prior=Horseshoe(levels=("rank",)), num_data=60)
    guide = RankDiagonal(model)
    with torch.no_grad():
        guide.log_variance.copy_(torch.linspace(-9.0, 1.5, 16))
    expected = guide.log_variance.detach().exp().expm1().log()
    torch.testing.assert_close(guide.log_alpha, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(guide.mean().detach(), torch.ones(16))
