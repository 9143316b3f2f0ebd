"""The adapted network as a generative program."""

import copy
import pickle
from typing import Any

import pyro
import pytest
import torch
from nets import bert, lora, regression, tokens
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI, Predictive
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA

BOTH = [GateLoRA, FactorLoRA]


def svi_for(model: Any, guide: Any, **options: Any) -> SVI:
    return SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=lrvd.RankELBO(**options))


def trainable(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BOTH)
def test_with_b_zero_the_network_is_the_base_bit_for_bit(
    family: Any, dtype: Any
) -> None:
    net = bert(randomise=False).to(dtype)
    batch = tokens(labels=False)
    with torch.no_grad(), net.disable_adapter():
        base = net(**batch).logits
    model = family(net, num_data=60)
    guide = RankDiagonal(model, init_log_alpha=2.0)
    with torch.no_grad():
        assert torch.equal(net(**batch).logits, base)
        with lrvd.posterior_sample(model, guide, seed=1) as bound:
            assert torch.equal(bound(**batch).logits, base)
        with lrvd.noise.PerExample(6):
            assert torch.equal(
                poutine.replay(model, poutine.trace(guide).get_trace())(**batch), base
            )


def test_with_noise_on_b_the_base_is_kept_at_the_posterior_mean_only() -> None:
    net = bert(randomise=False)
    batch = tokens(labels=False)
    base = net(**batch).logits
    model = FactorLoRA(net, num_data=60, sides=("lora_A", "lora_B"))
    guide = RankDiagonal(model, init_log_alpha=2.0)
    with lrvd.posterior_mean(model, guide):
        assert torch.equal(net(**batch).logits, base)
    with lrvd.posterior_sample(model, guide, seed=1):
        assert not torch.equal(net(**batch).logits, base)


@pytest.mark.parametrize("family", BOTH)
def test_frozen_base_has_no_gradient_and_never_enters_the_store(family: Any) -> None:
    net = bert()
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    model = family(net, num_data=60)
    guide = RankDiagonal(model)
    svi = svi_for(model, guide)
    for _ in range(3):
        svi.step(**tokens())
    for name, p in net.named_parameters():
        if name in frozen:
            assert p.grad is None and torch.equal(p, frozen[name]), name
    named = set(pyro.get_param_store().keys())
    heads = [n for n in named if "lora_" not in n and "modules_to_save" not in n]
    assert heads == [f"{guide._pyro_name}.log_variance"]


def test_gate_noise_has_covariance_b_diag_alpha_ax2_bt() -> None:
    net = regression(features=5, r=3, outputs=4)
    layer = net.base_model.model.linear
    A, B = layer.lora_A.default.weight, layer.lora_B.default.weight
    x = torch.randn(1, 5)
    model = GateLoRA(net, num_data=10)
    guide = RankDiagonal(model)
    with torch.no_grad():
        guide.log_variance.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    h = (A @ x[0]).detach()
    law = B @ torch.diag(guide.log_alpha.exp() * h**2) @ B.T

    def spread(x: Tensor, count: int = 20_000) -> Tensor:
        with torch.no_grad(), lrvd.noise.PerExample(count):
            gates = guide()
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
    guide = RankDiagonal(model)
    with torch.no_grad():
        guide.log_variance.copy_(torch.tensor([-2.0, 0.0, 1.0]))
    draws = torch.stack([guide() for _ in range(4000)]).view(-1, 3, 5)
    A = net.base_model.model.linear.lora_A.default.weight
    torch.testing.assert_close(draws.mean(0), A, rtol=0, atol=0.15)
    scales = draws.std(0).mean(1)
    torch.testing.assert_close(
        scales, (guide.log_variance / 2).exp(), rtol=0.05, atol=0.0
    )


@pytest.mark.parametrize("family", BOTH)
def test_svi_step_and_torch_driver_train_to_the_same_parameters(family: Any) -> None:
    batches = [tokens() for _ in range(4)]
    ends = []
    for driver in ("svi", "torch"):
        torch.manual_seed(0)
        model = family(bert(), num_data=60)
        guide = RankDiagonal(model)
        elbo = lrvd.RankELBO(kl_weight=lrvd.linear_warmup(3))
        torch.manual_seed(1)
        if driver == "svi":
            svi = SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=elbo)
            for batch in batches:
                svi.step(**batch)
        else:
            loss = elbo(model, guide)
            groups = lrvd.optim.parameter_groups(model, guide, lr=1e-2)
            optim = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
            for batch in batches:
                loss(**batch).backward()
                optim.step()
                optim.zero_grad()
        ends.append(trainable(model) + trainable(guide))
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_two_models_in_one_process_both_train() -> None:
    pairs = []
    for _ in range(2):
        model = GateLoRA(bert(), num_data=60)
        pairs.append((model, RankDiagonal(model)))
    for model, guide in pairs:
        before = trainable(model) + trainable(guide)
        svi = svi_for(model, guide)
        svi.step(**tokens())
        svi.step(**tokens())
        after = trainable(model) + trainable(guide)
        assert not any(torch.equal(a, b) for a, b in zip(before, after))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("family", BOTH)
def test_a_copy_trains_and_the_original_does_not_move(family: Any, how: str) -> None:
    model = family(bert(), num_data=60)
    guide = RankDiagonal(model)
    svi_for(model, guide).step(**tokens())
    before = trainable(model) + trainable(guide)
    pair = (model, guide)
    copied = (
        copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    )
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(copied[0])))
    svi = svi_for(*copied)
    for _ in range(2):
        svi.step(**tokens())
    moved = trainable(copied[0]) + trainable(copied[1])
    assert not any(torch.equal(a, b) for a, b in zip(before, moved))
    assert all(
        torch.equal(a, b) for a, b in zip(before, trainable(model) + trainable(guide))
    )


def test_release_takes_the_parameters_out_of_the_store() -> None:
    model = GateLoRA(bert(), num_data=60)
    other = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    for m in (model, other):
        svi_for(m, RankDiagonal(m) if m is other else guide).step(**tokens())
    before = trainable(model)
    model.release()
    guide.release()
    names = list(pyro.get_param_store().keys())
    assert names and not any(
        n.startswith((model._pyro_name + ".", guide._pyro_name + ".")) for n in names
    )
    assert all(torch.equal(a, b) for a, b in zip(before, trainable(model)))
    svi_for(model, guide).step(**tokens())
    assert not any(torch.equal(a, b) for a, b in zip(before, trainable(model)))


def test_a_conditioned_gate_is_observed() -> None:
    model = GateLoRA(bert(), num_data=60)
    gate = torch.full((model.space.size,), 0.5)
    fixed = pyro.condition(model, {"gate": gate})
    batch = tokens(labels=False)
    with model.space.bind(gate):
        expected = model.base_net(**batch).logits
    torch.testing.assert_close(fixed(**batch), expected)
    elbo = lrvd.RankELBO()
    assert elbo.loss(fixed, lambda **batch: None, **tokens()) > 0
    assert elbo.terms["kl"] == {"total": 0}


def test_a_blocked_network_stays_while_the_guide_trains() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    kept, start = trainable(model), trainable(guide)
    svi = svi_for(poutine.block(model, hide_types=["param"]), guide)
    svi.step(**tokens())
    assert all(torch.equal(a, b) for a, b in zip(kept, trainable(model)))
    assert not torch.equal(start[0], trainable(guide)[0])


def test_a_plain_function_is_a_guide() -> None:
    model = GateLoRA(bert(), num_data=60)

    def guide(**batch: Any) -> None:
        loc = pyro.param("loc", torch.ones(model.space.size))
        pyro.sample("gate", dist.Normal(loc, 0.1).to_event(1))

    svi = svi_for(model, guide)
    svi.step(**tokens())
    assert not torch.equal(pyro.param("loc"), torch.ones(model.space.size))


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
    guide = RankDiagonal(model, learn_mean=True)
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


def test_weight_prior_is_counted_once_and_named_in_the_terms() -> None:
    net = bert()
    model = GateLoRA(net, num_data=60, weight_prior=dist.Normal(0.0, 1.0))
    guide = RankDiagonal(model)
    elbo = lrvd.RankELBO(kl_weight=2.0)
    loss = elbo.loss(model, guide, **tokens())
    weights = [p for n, p in net.named_parameters() if "lora_" in n]
    expected = sum(dist.Normal(0.0, 1.0).log_prob(w).sum() for w in weights)
    terms = elbo.terms
    torch.testing.assert_close(terms["weight_prior"], expected.detach())
    total = 2 * (terms["kl"]["total"] - terms["weight_prior"]) - terms["log_likelihood"]
    assert loss == pytest.approx(float(total))


def test_a_scale_is_vacuous_without_a_weight_prior() -> None:
    """Gates times s and B over s give the same likelihood: only a prior on B sees s."""
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
    with lrvd.noise.PerExample(6):
        trace = poutine.trace(model).get_trace(**tokens())
    gate = trace.nodes["gate"]
    assert gate["value"].shape == (6, model.space.size)
    torch.testing.assert_close(
        gate["value"], trace.nodes["scale"]["value"] * trace.nodes["z"]["value"]
    )


def scalar_scale(space: Any) -> Tensor:
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    return pyro.sample("gate", dist.Normal(torch.zeros(space.size), scale).to_event(1))


def plain_index(space: Any) -> Tensor:
    scale = pyro.sample("scale", dist.HalfCauchy(torch.ones(2)).to_event(1))
    index = torch.arange(space.size) % 2
    return pyro.sample("gate", dist.Normal(0.0, scale[index]).to_event(1))


def plated(space: Any) -> Tensor:
    with pyro.plate("ranks", space.size):
        return pyro.sample("gate", dist.Normal(0.0, 1.0))


def factored(space: Any) -> Tensor:
    pyro.factor("extra", torch.zeros(()))
    return pyro.sample("gate", dist.Normal(torch.zeros(space.size), 1.0).to_event(1))


def too_short(space: Any) -> Tensor:
    return pyro.sample("gate", dist.Normal(torch.zeros(2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("prior", "problem"),
    [
        (scalar_scale, r"it fails on a batch|'scale' has 0 event dimensions"),
        (plain_index, r"it fails on a batch|gate has shape"),
        (plated, r"'gate' stands in a plate"),
        (factored, r"'extra' is observed \(or a pyro.factor\)"),
        (too_short, r"the gate has shape \(2, 2\) on a batch of 2; expected \(2, 16\)"),
    ],
)
def test_a_breach_of_the_priors_contract_shows_the_contract(
    prior: Any, problem: str
) -> None:
    model = GateLoRA(bert(), prior=prior, num_data=60)
    with pytest.raises(ValueError, match=problem) as error:
        model(**tokens())
    assert "one event dimension: .to_event(1)" in str(error.value)


def normalised(space: Any) -> Tensor:
    z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1.0).to_event(1))
    return z / z.norm()


def indexed_at_equal_sizes(space: Any) -> Tensor:
    s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1.0).to_event(1))
    return z * s[torch.tensor([0, 1])]


@pytest.mark.parametrize(("prior", "r"), [(normalised, 3), (indexed_at_equal_sizes, 2)])
def test_a_prior_that_mixes_examples_is_found_out(prior: Any, r: int) -> None:
    model = GateLoRA(regression(r=r), prior=prior, num_data=9, likelihood=Normal())
    with pytest.raises(
        ValueError, match="draws of other examples|fails on a batch of 3"
    ):
        model(x=torch.randn(4, 5))


def test_several_draws_at_once_are_refused_outside_the_elbo() -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    predictive = Predictive(model, guide=guide, num_samples=6, parallel=True)
    with pytest.raises(ValueError, match=r"several draws at once; use Predictive\(par"):
        predictive(**tokens(labels=False))


@pytest.mark.parametrize("owner", ["model", "guide"])
def test_a_replaced_parameter_is_an_error_and_release_mends_it(owner: str) -> None:
    model = GateLoRA(bert(), num_data=60)
    guide = RankDiagonal(model)
    svi = svi_for(model, guide)
    svi.step(**tokens())
    if owner == "model":
        lora_B = model.space.layers[0].lora_B["default"]
        lora_B.weight = torch.nn.Parameter(lora_B.weight.detach().clone())
    else:
        guide.__dict__["_parameters"]["log_variance"] = torch.nn.Parameter(
            torch.zeros(16)
        )
    with pytest.raises(RuntimeError, match=r"holds another tensor .* call release\(\)"):
        svi.step(**tokens())
    (model if owner == "model" else guide).release()
    svi_for(model, guide).step(**tokens())


def test_a_refused_model_leaves_no_hook() -> None:
    net = bert()
    with pytest.raises(TypeError, match="num_data"):
        GateLoRA(net)
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_labels_must_be_a_tensor_and_the_batch_not_empty() -> None:
    model = GateLoRA(bert(), num_data=60)
    with pytest.raises(TypeError, match=r"labels are a list; .*torch.as_tensor"):
        model(**tokens(labels=False), labels=[0] * 6)
    with pytest.raises(ValueError, match="the batch has no examples"):
        model(**tokens(0))


def test_noise_of_a_regression_starts_positive() -> None:
    with pytest.raises(ValueError, match="scale=-1.0; expected a positive"):
        Normal(-1.0)


def test_a_site_called_weight_prior_is_no_weight_prior() -> None:
    def guide(**batch: Any) -> None:
        pass

    def model(x: Tensor) -> None:
        pyro.sample("weight_prior", dist.Normal(0.0, 1.0), obs=x.sum())

    elbo = lrvd.RankELBO()
    elbo.loss(model, guide, x=torch.zeros(2))
    assert "weight_prior" not in elbo.terms and "log_likelihood" in elbo.terms


@pytest.mark.parametrize("family", BOTH)
@pytest.mark.parametrize("num_data", [None, 0, 12.0, True])
def test_num_data_must_be_given(family: Any, num_data: Any) -> None:
    with pytest.raises(
        TypeError, match=r"num_data=.*; expected the number of training"
    ):
        family(bert(), num_data=num_data)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    model = GateLoRA(bert(), num_data=5)
    with pytest.raises(ValueError, match=r"has 6 examples but num_data=5"):
        model(**tokens())
    assert model(**tokens(labels=False)).shape == (6, 3)  # prediction may be larger


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        (torch.tensor([0, 1, 2, 3, 0, 0]), ValueError, r"0 .. 3 but .* 3 classes"),
        (
            torch.tensor([0, -1, 2, 0, 0, 0]),
            ValueError,
            r"labels lie in -1 .. 2.*leave out rows",
        ),
        (torch.zeros(6), TypeError, r"dtype torch.float.*expected integers"),
        (
            torch.zeros(6, 3, dtype=torch.long),
            ValueError,
            r"one label per row of logits",
        ),
    ],
)
def test_bad_labels_are_named(labels: Tensor, error: Any, match: str) -> None:
    model = GateLoRA(bert(), num_data=60)
    with pytest.raises(error, match=match):
        model(**tokens(labels=False), labels=labels)


def test_bad_regression_targets_are_named() -> None:
    model = GateLoRA(regression(), num_data=60, likelihood=Normal())
    x = torch.randn(4, 5)
    with pytest.raises(TypeError, match=r"torch.int64; expected floating point"):
        model(x=x, labels=torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"one label per prediction"):
        model(x=x, labels=torch.zeros(4, 2))
    wide = GateLoRA(regression(outputs=2), num_data=60, likelihood=Normal())
    with pytest.raises(ValueError, match=r"expected one per example.*num_labels=1"):
        wide(x=x, labels=torch.zeros(4))


def test_a_batch_without_tensors_is_refused() -> None:
    model = GateLoRA(bert(), num_data=60)
    with pytest.raises(TypeError, match=r"\['labels', 'text'\] holds no tensor"):
        model(text=["a"])


def test_factor_lora_has_one_prior_and_two_choices_of_sides() -> None:
    with pytest.raises(TypeError, match="GateLoRA takes any prior"):
        FactorLoRA(bert(), prior=scalar_scale, num_data=60)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"sides=\('lora_B',\); expected"):
        FactorLoRA(bert(), num_data=60, sides=("lora_B",))


def test_conv_layers_are_for_gates_only() -> None:
    conv = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3))
    net = lora(conv, target_modules=["0"])
    with pytest.raises(
        TypeError, match="need Linear or Conv1D layers: use models.GateLoRA"
    ):
        FactorLoRA(net, num_data=60)
