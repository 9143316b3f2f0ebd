"""What is loaded is what was saved, for this library and for plain PEFT."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import nets
import pyro
import pytest
import torch
from nets import tokens
from pairs import rank_guide
from peft import LoraConfig
from pyro import distributions as dist
from pyro.infer import SVI
from stored import fresh, mean_logits, perturbed, plain_logits, same_predictions, saved
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro import likelihoods, priors
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.selection.criteria import prune
from lrvd_pyro.selection.removal import select
from lrvd_pyro.storage.folder import load, save

exactly = partial(torch.testing.assert_close, rtol=0, atol=1e-12)
PAIR = ("lora_A", "lora_B")
NORMAL = dist.Normal(0.0, 1.0)
NETS: dict[str, Callable[[], Any]] = {
    "linear": nets.bert,
    "conv1d": nets.gpt2,
    "rslora": partial(nets.bert, use_rslora=True, lora_alpha=7),
    "dora": partial(nets.bert, use_dora=True),
    "bias": partial(nets.bert, bias="all"),
    "ragged": partial(nets.perceptron, **nets.RAGGED),
    "conv2d": nets.conv,
}
PRIORS: dict[str, Callable[[], Any]] = {
    "log-uniform": partial(priors.LogUniform, 7.0),
    "truncated": partial(priors.TruncatedLogUniform, -10.0, 1.0),
    "normal": partial(priors.Normal, 0.3),
    "ard": priors.ARD,
    "horseshoe": partial(priors.Horseshoe, 0.5, levels=("module", "rank"), slab=3.0),
    "hierarchical": partial(priors.Hierarchical, dist.HalfNormal, "type"),
    "partial": partial(priors.Hierarchical, partial(dist.Normal, 0.0), "layer"),
    "spike-slab": partial(priors.SpikeSlab, 0.7, 0.4),
}


def inputs_for(kind: str) -> dict[str, Tensor]:
    if kind == "conv2d":
        return {"x": torch.randn(4, 3, 6, 6)}
    return {"x": torch.randn(4, 5)} if kind == "ragged" else tokens(4, labels=False)


@pytest.mark.parametrize("kind", NETS)
def test_predictions_are_the_same_bit_for_bit_and_peft_has_the_mean(
    kind: str, tmp_path: Path
) -> None:
    net, inputs = NETS[kind](), inputs_for(kind)
    model = GateLoRA(net, num_data=60)
    guide = perturbed(model, rank_guide(model, learn_mean=True))
    path = save(tmp_path / "run", model, guide)
    pair = load(path, fresh(net))
    if kind != "conv1d":  # whose logits are of a language model
        same_predictions((model, guide), pair, inputs)
    mean = mean_logits(model, guide, inputs)
    assert torch.equal(mean_logits(*pair, inputs), mean)
    exactly(plain_logits(fresh(net), path, inputs), mean)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sides", [("lora_A",), PAIR])
def test_factor_lora_comes_back(sides: Any, bias: bool, tmp_path: Path) -> None:
    net, inputs = nets.bert(lora_bias=bias), tokens(4, labels=False)
    model = FactorLoRA(net, num_data=60, sides=sides)
    guide = perturbed(model)
    path = save(tmp_path / "run", model, guide)
    pair = load(path, fresh(net))
    assert isinstance(pair[0], FactorLoRA) and pair[0].space.sides == sides
    same_predictions((model, guide), pair, inputs)
    mean = mean_logits(model, guide, inputs)
    exactly(plain_logits(fresh(net), path, inputs), mean)


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_comes_back_by_its_name(name: str, tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    weights = None if name == "log-uniform" else dist.Normal(0.0, 0.5)
    model = GateLoRA(net, prior=PRIORS[name](), num_data=60, weight_prior=weights)
    guide = perturbed(model)
    path = save(tmp_path / "run", model, guide)
    loaded, its = load(path, fresh(net))
    assert isinstance(loaded, GateLoRA)
    assert type(loaded.prior) is type(model.prior)
    latents = {n: torch.rand(q.mean.shape) for n, q in guide.distributions().items()}
    assert torch.equal(loaded.log_prior(latents), model.log_prior(latents))
    same_predictions((model, guide), (loaded, its), inputs)
    exactly(plain_logits(fresh(net), path, inputs), mean_logits(model, guide, inputs))
    assert str(loaded.weight_prior) == str(weights)


def test_a_learned_noise_comes_back(tmp_path: Path) -> None:
    net, inputs = nets.regression(), {"x": torch.randn(4, 5)}
    model = GateLoRA(net, likelihood=likelihoods.Normal(0.3), num_data=60)
    guide = perturbed(model)
    loaded, its = load(save(tmp_path / "run", model, guide), fresh(net))
    likelihood: Any = loaded.likelihood
    assert abs(likelihood.scale.item() - 0.3) > 1e-3
    same_predictions((model, guide), (loaded, its), inputs)


def test_a_pruned_pair_comes_back_pruned(tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    model = GateLoRA(net, prior=priors.Horseshoe(), num_data=60, weight_prior=NORMAL)
    guide = perturbed(model)
    with torch.no_grad():
        guide.log_variance[-10:-3] = 2.0  # a module and more
    prune(model, guide, log_alpha_threshold=0.0)
    assert len(model.space.modules) < 4 and len(set(model.space.ranks)) > 1
    path = save(tmp_path / "run", model, guide)
    pair = load(path, fresh(net))
    space = pair[0].space
    assert space.ranks == model.space.ranks and space.origin == model.space.origin
    same_predictions((model, guide), pair, inputs)
    exactly(plain_logits(fresh(net), path, inputs), mean_logits(model, guide, inputs))
    again = save(tmp_path / "again", *pair)
    same_predictions((model, guide), load(again, fresh(net)), inputs)


def test_one_rank_per_module_does_not_confuse_their_scales(tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    model = GateLoRA(net, prior=priors.Horseshoe(), num_data=60, weight_prior=NORMAL)
    guide = perturbed(model)
    select(model, guide, keep=torch.arange(16) % 4 == 2)
    assert guide.held == ("rank_scale",)
    _, its = pair = load(save(tmp_path / "run", model, guide), fresh(net))
    assert its.held == ("rank_scale",)
    same_predictions((model, guide), pair, inputs)


def test_training_goes_on_as_it_would_have(tmp_path: Path) -> None:
    net = nets.bert()
    model = GateLoRA(net, prior=priors.ARD(), num_data=60)
    guide = perturbed(model)
    model.prior.log_gamma.requires_grad_(False)
    pair = load(save(tmp_path / "run", model, guide), fresh(net))
    pair[0].base_net.train(net.training)
    batch, ends = tokens(), []
    for one in [(model, guide), pair]:
        pyro.set_rng_seed(0)
        svi = SVI(*one, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
        losses = [svi.step(**batch) for _ in range(3)]
        own = [*one[0].named_parameters(), *one[1].named_parameters()]
        ends.append((losses, {n: p.requires_grad for n, p in own}))
    assert ends[0] == ends[1]


def test_saving_in_plain_peft_after_loading_is_right(tmp_path: Path) -> None:
    net, inputs = nets.bert(use_rslora=True, lora_alpha=7), tokens(4, labels=False)
    model = GateLoRA(net, num_data=60)
    guide = perturbed(model)
    select(model, guide, keep=torch.arange(16) > 5)
    loaded, its = load(save(tmp_path / "run", model, guide), fresh(net))
    loaded.base_net.save_pretrained(tmp_path / "peft")
    found = plain_logits(fresh(net), tmp_path / "peft", inputs)
    exactly(found, mean_logits(loaded, its, inputs))  # all gates have mean 1


def test_half_precision_comes_back(tmp_path: Path) -> None:
    torch.set_default_dtype(torch.float32)
    net, inputs = nets.bert().to(torch.bfloat16), tokens(4, labels=False)
    model = GateLoRA(net, num_data=60)
    guide = perturbed(model)
    loaded, its = load(save(tmp_path / "run", model, guide), fresh(net))
    assert {p.dtype for p in loaded.base_net.parameters()} == {torch.bfloat16}
    same_predictions((model, guide), (loaded, its), inputs)


def test_a_base_in_another_precision_is_the_same_base(tmp_path: Path) -> None:
    path, _, _ = saved(tmp_path)
    net = fresh(nets.bert()).double()
    with pytest.raises(ValueError, match="is not the base"):
        load(path, net)
    path, model, _ = saved(tmp_path)
    load(path, fresh(model.base_net).bfloat16())


def test_a_second_adapter_stays_out(tmp_path: Path) -> None:
    net, inputs = nets.bert(), tokens(4, labels=False)
    other = LoraConfig(r=2, target_modules=["key"], init_lora_weights=False)
    net.add_adapter("mine", other)
    net.set_adapter("mine")
    model = GateLoRA(net, num_data=60)
    guide = perturbed(model)
    path = save(tmp_path / "run", model, guide)
    pair = load(path, fresh(net))
    assert list(pair[0].base_net.peft_config) == ["mine"]
    same_predictions((model, guide), pair, inputs)
    exactly(plain_logits(fresh(net), path, inputs), mean_logits(model, guide, inputs))
