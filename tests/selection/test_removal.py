"""Rank selection removes ranks from network, guide, prior and optimizer alike."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import nets
import pyro
import pytest
import torch
from nets import tokens
from pairs import rank_guide
from peft import LoraConfig, get_peft_model_state_dict
from pruned import MODELS, PAIR, outputs, some, trained
from pyro import distributions as dist
from pyro.nn import PyroModule
from torch import Tensor, nn

from lrvd_pyro import RankSpace, priors
from lrvd_pyro.distributions import TruncatedLogUniform
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.predictive.predictive import posterior_mean
from lrvd_pyro.selection.criteria import prune
from lrvd_pyro.selection.removal import select

close = torch.testing.assert_close
exactly = partial(close, rtol=0, atol=1e-12)

NETS: dict[str, Callable[[], Any]] = {
    "linear": nets.bert,
    "conv1d": nets.gpt2,
    "rslora": partial(nets.bert, use_rslora=True),
    "dora": partial(nets.bert, use_dora=True),
    "ragged": partial(nets.perceptron, **nets.RAGGED),
    "conv2d": nets.conv,
}


def inputs_for(kind: str) -> dict[str, Tensor]:
    if kind == "conv2d":
        return {"x": torch.randn(4, 3, 6, 6)}
    return {"x": torch.randn(4, 5)} if kind == "ragged" else tokens(4, labels=False)


# Logits


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("family", MODELS)
def test_removing_components_is_setting_their_draws_to_zero(
    kind: str, family: str
) -> None:
    model = MODELS[family](NETS[kind]())
    guide = rank_guide(model)
    space, inputs = model.space, inputs_for(kind)
    keep = some(space, gone=None if kind == "dora" else 0)
    each = guide.owner if family != "gate" else torch.arange(space.size)
    value = torch.randn(len(each))
    expected = outputs(model, value * keep[each], inputs)
    assert (outputs(model, value, inputs) - expected).abs().max() > 1e-6
    mean = outputs(model, guide.mean().detach() * keep[each], inputs)
    select(model, guide, keep=keep)
    exactly(outputs(model, value[keep[each]], inputs), expected)
    with torch.no_grad(), posterior_mean(model, guide):
        exactly(model.predictions(**inputs), mean)


def test_dora_is_exact_while_a_rank_stays_and_refuses_to_lose_the_last() -> None:
    model = MODELS["gate"](nets.bert(use_dora=True))
    guide = rank_guide(model)
    keep = some(model.space)
    with pytest.raises(ValueError, match="no rank of the DoRA layer .*min_rank=1"):
        select(model, guide, keep=keep)
    assert model.space.ranks == (4, 4, 4, 4)
    with torch.no_grad():
        guide.log_variance.fill_(5.0)
        guide.log_variance[::4] = 4.0  # the best of each module
    kept = prune(model, guide)
    assert model.space.ranks == (1, 1, 1, 1) and kept[::4].all()


# Objects, hooks and attributes


@pytest.mark.parametrize("kind", NETS)
def test_modules_and_parameters_stay_the_same_objects(kind: str) -> None:
    model = MODELS["gate"](NETS[kind]())
    guide = rank_guide(model)
    space = model.space
    modules, params = list(space.layers), dict(model.named_parameters())
    scalings = [m.scaling["default"] for m in modules]
    data = {name: p.detach().clone() for name, p in params.items()}
    select(model, guide, keep=some(space, gone=None))
    assert all(a is b for a, b in zip(space.layers, modules, strict=True))
    assert [m.scaling["default"] for m in modules] == scalings
    for name, p in model.named_parameters():
        assert p is params[name] and p.is_contiguous()
        frozen = "lora_A" not in name and "lora_B" not in name
        close(p.detach(), data[name] if frozen else _halved(data[name], name))
    for layer, rank in zip(modules, space.ranks):
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        assert layer.r["default"] == rank == len(A.weight) == B.weight.shape[1]
        told = A.out_features if hasattr(A, "out_features") else A.out_channels
        assert told == rank
        told = B.in_features if hasattr(B, "in_features") else B.in_channels
        assert told == rank


def _halved(data: Tensor, name: str) -> Tensor:
    return data[1::2] if "lora_A" in name else data[:, 1::2]


def test_closing_after_selecting_leaves_no_hook() -> None:
    net = nets.bert()
    model = FactorLoRA(net, num_data=60, sides=PAIR)
    select(model, rank_guide(model), keep=some(model.space))
    assert nets.hooks(net) == 3 * 3  # a gate and two weights in each module
    model.space.close()
    assert nets.hooks(net) == 0


@pytest.mark.parametrize("family", MODELS)
def test_a_copy_of_a_pruned_pair_is_pruned_and_has_its_own_draws(family: str) -> None:
    model = MODELS[family](nets.bert())
    guide = rank_guide(model)
    select(model, guide, keep=some(model.space))
    twin, its = copy.deepcopy((model, guide))
    inputs, value = tokens(labels=False), guide.mean().detach()
    exactly(outputs(twin, value, inputs), outputs(model, value, inputs))
    select(twin, its, keep=some(twin.space))
    assert (model.space.ranks, twin.space.ranks) == ((2, 2, 2), (1, 1))
    outputs(model, value, inputs)


def test_components_keep_their_first_numbers() -> None:
    model = MODELS["gate"](nets.bert())
    guide = rank_guide(model)
    select(model, guide, keep=some(model.space))
    select(model, guide, keep=some(model.space, gone=None))
    assert model.space.origin == (7, 11, 15)


# Modules without rank


def test_a_module_without_rank_leaves_and_every_adapter_still_works() -> None:
    net = nets.bert()
    net.add_adapter("other", LoraConfig(r=2, target_modules=["query"]))
    for name, p in net.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(p)
    net.set_adapter("default")
    inputs = tokens(labels=False)
    with torch.no_grad():
        net.set_adapter("other")
        theirs = net(**inputs).logits
        net.set_adapter("default")
        with net.disable_adapter():
            base = net(**inputs).logits
    model = MODELS["gate"](net)
    guide, keep = rank_guide(model), some(model.space)
    expected = outputs(model, keep.to(torch.float64), inputs)
    flags = {n: p.requires_grad for n, p in net.named_parameters()}
    select(model, guide, keep=keep)
    assert model.space.ranks == (2, 2, 2)
    assert net.active_adapters == ["default"]
    assert all(flags[n] == p.requires_grad for n, p in net.named_parameters())
    with torch.no_grad():
        exactly(net(**inputs).logits, expected)
        with net.disable_adapter():
            exactly(net(**inputs).logits, base)
        net.set_adapter("other")
        exactly(net(**inputs).logits, theirs)
        net.set_adapter("default")
        net.merge_adapter()
        close(net(**inputs).logits, expected)
        with pytest.warns(UserWarning, match="Already unmerged"):  # PEFT, of the gap
            net.unmerge_adapter()
    saved = get_peft_model_state_dict(net)
    assert not any("layer.0.attention.self.query" in name for name in saved)
    assert RankSpace(net).modules == model.space.modules
    svi, _ = trained(model, guide)
    svi.step(**tokens())


# Guides and priors


def test_log_alpha_of_a_horseshoe_follows_its_components() -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=priors.Horseshoe())
    guide = rank_guide(model, learn_mean=True)
    with torch.no_grad():
        guide.log_variance.uniform_(-3, 1)
        guide.loc.uniform_(-1, 1)
    keep, log_alpha, mean = some(model.space), guide.log_alpha, guide.mean()
    select(model, guide, keep=keep)
    exactly(guide.log_alpha, log_alpha[keep])
    exactly(guide.mean(), mean[keep])
    sizes = {name: q.mean.numel() for name, q in guide.distributions().items()}
    assert sizes == {"global_scale": 1, "module_scale": 3, "rank_scale": 6}


@pytest.mark.parametrize("over", ["module", "layer", "type"])
def test_scales_follow_their_groups_though_these_are_renumbered(over: Any) -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=priors.Hierarchical(over=over))
    guide = rank_guide(model)

    def scales() -> dict[Any, float]:
        labels = dict.fromkeys(model.space.coordinates[over])
        means = guide.distributions()[f"{over}_scale"].mean
        return dict(zip(labels, means.tolist(), strict=True))

    with torch.no_grad():
        guide.loc.copy_(torch.arange(len(guide.loc)))
    before = scales()
    select(model, guide, keep=some(model.space))  # the first type is now the second
    after = scales()
    assert after == {label: before[label] for label in after}
    if over == "type":
        assert list(after) == list(before)[::-1]


def bounded_differently(space: RankSpace) -> Tensor:
    high = 0.5 + torch.tensor(space.origin) / 4
    prior = TruncatedLogUniform(-4.0 - high, high)
    value: Tensor = pyro.sample("gate", prior.to_event(1))
    return value


def test_bounds_and_held_means_follow_their_components() -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=bounded_differently)
    guide = rank_guide(model, init_log_alpha=1.0)
    guide._held["gate"] += torch.arange(16) / 16  # as if it started there
    keep, mean = some(model.space), guide.mean().detach()
    assert len(mean.unique()) == 16
    select(model, guide, keep=keep)
    exactly(guide.mean().detach(), mean[keep])


class PerRank(PyroModule):
    """A prior with a parameter and a buffer per rank component."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(size))
        self.register_buffer("center", torch.arange(size) / 10)

    def forward(self, space: RankSpace) -> Tensor:
        gate = dist.Normal(self.center, self.log_scale.exp()).to_event(1)
        value: Tensor = pyro.sample("gate", gate)
        return value


def test_what_a_prior_holds_per_component_is_sliced_and_trains_on() -> None:
    model = GateLoRA(nets.bert(), num_data=60, prior=PerRank(16))
    guide = rank_guide(model)
    svi, optim = trained(model, guide)
    keep, before = some(model.space), model.prior.log_scale.detach().clone()
    select(model, guide, optim, keep=keep)
    close(model.prior.log_scale.detach(), before[keep])
    close(model.prior.center, (torch.arange(16) / 10)[keep])
    svi.step(**tokens())
    assert (model.prior.log_scale != before[keep]).all()
