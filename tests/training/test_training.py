"""Training, copying and releasing models, in either driver."""

import copy
import pickle
from typing import Any

import pyro
import pytest
import torch
from nets import bert, tokens
from pairs import rank_guide
from pyro import distributions as dist
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

import lrvd_pyro as lrvd
from lrvd_pyro.models import FactorLoRA, GateLoRA

BOTH = [GateLoRA, FactorLoRA]


def svi_for(model: Any, guide: Any, **options: Any) -> SVI:
    return SVI(model, guide, lrvd.optim.AdamW(lr=1e-2), loss=lrvd.RankELBO(**options))


def trainable(module: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", BOTH)
def test_frozen_base_has_no_gradient_and_never_enters_the_store(family: Any) -> None:
    net = bert()
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    model = family(net, num_data=60)
    guide = rank_guide(model)
    svi = svi_for(model, guide)
    for _ in range(3):
        svi.step(**tokens())
    for name, p in net.named_parameters():
        if name in frozen:
            assert p.grad is None and torch.equal(p, frozen[name]), name
    named = set(pyro.get_param_store().keys())
    heads = [n for n in named if "lora_" not in n and "modules_to_save" not in n]
    assert heads == [f"{guide._pyro_name}.log_variance"]


@pytest.mark.parametrize("family", BOTH)
def test_svi_step_and_torch_driver_train_to_the_same_parameters(family: Any) -> None:
    batches = [tokens() for _ in range(4)]
    ends = []
    for driver in ("svi", "torch"):
        torch.manual_seed(0)
        model = family(bert(), num_data=60)
        guide = rank_guide(model)
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
        pairs.append((model, rank_guide(model)))
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
    guide = rank_guide(model)
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
    guide = rank_guide(model)
    for m in (model, other):
        svi_for(m, rank_guide(m) if m is other else guide).step(**tokens())
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
    guide = rank_guide(model)
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
