"""What a model refuses, and the way out that it names."""

from typing import Any

import pyro
import pytest
import torch
from nets import bert, hooks, regression, tokens
from pyro import distributions as dist
from pyro.infer import SVI, Predictive
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.likelihoods.normal import Normal
from lrvd_pyro.models import FactorLoRA, GateLoRA

BOTH = [GateLoRA, FactorLoRA]


def svi_for(model: Any, guide: Any, **options: Any) -> SVI:
    return SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=lrvd.RankELBO(**options))


def trainable(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


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


def not_a_number(space: Any) -> Tensor:
    z = pyro.sample("z", dist.Normal(torch.zeros(space.size), 1.0).to_event(1))
    return z.abs().neg().log()


def bare_parameter(space: Any) -> Tensor:
    scale = pyro.param("scale", torch.ones(space.size))
    zero = torch.zeros(space.size)
    return pyro.sample("gate", dist.Normal(zero, scale).to_event(1))


@pytest.mark.parametrize(
    ("prior", "problem"),
    [
        (not_a_number, r"the gate is NaN"),
        (bare_parameter, r"'scale' is a pyro.param; make the prior a PyroModule"),
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
    with pytest.raises(ValueError, match=problem) as error:
        GateLoRA(bert(), prior=prior, num_data=60)
    assert "one event dimension: .to_event(1)" in str(error.value)


def normalized(space: Any) -> Tensor:
    z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1.0).to_event(1))
    return z / z.norm()


def indexed_at_equal_sizes(space: Any) -> Tensor:
    s = pyro.sample("s", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
    z = pyro.sample("z", dist.Normal(torch.ones(space.size), 1.0).to_event(1))
    return z * s[torch.tensor([0, 1])]


@pytest.mark.parametrize(("prior", "r"), [(normalized, 3), (indexed_at_equal_sizes, 2)])
def test_a_prior_that_mixes_examples_is_found_out(prior: Any, r: int) -> None:
    with pytest.raises(
        ValueError, match="draws of other examples|fails on a batch of 3"
    ):
        GateLoRA(regression(r=r), prior=prior, num_data=9, likelihood=Normal())


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


def test_a_network_that_returns_a_tuple_is_refused() -> None:
    model, batch = GateLoRA(bert(), num_data=9), tokens() | {"return_dict": False}
    with pytest.raises(TypeError, match="returned a tuple; expected a tensor or an"):
        model(**batch)


def test_noise_of_a_regression_starts_positive() -> None:
    with pytest.raises(ValueError, match="scale=-1.0; expected a positive"):
        Normal(-1.0)


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


@pytest.mark.parametrize(
    "prior", ["horseshoe", dist.Normal(0.0, 1.0), lrvd.priors.Normal]
)
def test_a_prior_that_is_not_a_function_is_refused(prior: Any) -> None:
    with pytest.raises(TypeError, match=r"prior is .*; expected a function from the R"):
        GateLoRA(bert(), prior=prior, num_data=60)


def test_a_family_without_a_default_scale_shows_the_contract() -> None:
    prior = lrvd.priors.Hierarchical(dist.Normal)
    with pytest.raises(ValueError, match="missing 1 required .*'scale'(.|\n)*maps a R"):
        GateLoRA(bert(), prior=prior, num_data=60)


@pytest.mark.parametrize("density", [1.0, dist.Normal(torch.zeros(2), 1.0).to_event(1)])
def test_a_weight_prior_is_a_density_of_single_weights(density: Any) -> None:
    with pytest.raises(TypeError, match="weight_prior is .*; expected a density of"):
        GateLoRA(bert(), weight_prior=density, num_data=60)


def test_a_refused_prior_leaves_nothing_in_the_store() -> None:
    with pytest.raises(ValueError, match="'scale' is a pyro.param"):
        GateLoRA(bert(), prior=bare_parameter, num_data=60)
    assert "scale" not in pyro.get_param_store()


@pytest.mark.parametrize(
    "wrong",
    [
        {"likelihood": "x"},
        {"prior": "x"},
        {"prior": lambda space: torch.ones(space.size + 1)},
        {"weight_prior": 1.0},
        {"num_data": None},
    ],
    ids=str,
)
def test_a_model_that_is_refused_leaves_no_hook(wrong: dict[str, Any]) -> None:
    net = bert()
    with pytest.raises((TypeError, ValueError)):
        GateLoRA(net, **{"num_data": 60} | wrong)
    with pytest.raises((TypeError, ValueError)):
        FactorLoRA(net, **{"num_data": 60} | wrong)
    assert hooks(net) == 0
    GateLoRA(net, num_data=60)
    assert hooks(net) > 0  # the twin
