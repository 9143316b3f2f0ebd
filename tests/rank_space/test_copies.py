"""Copies of a model and of its network have draws of their own."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import hooks
from peft import PeftModel
from pyro.infer import SVI
from transformers import BertForSequenceClassification

from lrvd_pyro import RankELBO, RankSpace
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.optim import AdamW

close = torch.testing.assert_close


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_has_its_own_bank(duplicate: Callable[[GateLoRA], GateLoRA]) -> None:
    model = GateLoRA(nets.perceptron(), num_data=10)
    twin = duplicate(model)
    x = torch.randn(2, 5)
    plain = model.base_net(x)
    assert hooks(twin.base_net) == hooks(model.base_net)
    with twin.space.bind(torch.zeros(8)):
        gated = twin.base_net(x)
        close(model.base_net(x), plain, rtol=0, atol=0)
    with model.space.bind(torch.zeros(8)):
        close(model.base_net(x), gated, rtol=0, atol=0)
        close(twin.base_net(x), plain, rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_made_within_a_block_has_no_draw(
    duplicate: Callable[[GateLoRA], GateLoRA],
) -> None:
    model = GateLoRA(nets.perceptron(), num_data=10)
    x = torch.randn(2, 5)
    plain = model.base_net(x)
    with model.space.bind(torch.zeros(8)):
        twin = duplicate(model)
    close(twin.base_net(x), plain, rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.loads])
def test_a_copied_network_follows_no_space_until_it_gets_its_own(
    duplicate: Callable[[Any], PeftModel],
) -> None:
    net, x = nets.perceptron(), torch.randn(2, 5)
    space = RankSpace(net)
    twin = duplicate(pickle.dumps(net) if duplicate is pickle.loads else net)
    plain = twin(x)
    with space.bind(torch.zeros(space.size)):
        base = net(x)
        close(twin(x), plain, rtol=0, atol=0)
    own = RankSpace(twin)
    with own.bind(torch.zeros(own.size)):
        close(twin(x), base, rtol=0, atol=0)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_copy_trains_and_the_original_does_not_move(
    duplicate: Callable[[Any], Any],
) -> None:
    batch = {"x": torch.randn(6, 5), "labels": torch.randint(0, 3, (6,))}
    model = GateLoRA(nets.perceptron(), num_data=6)
    twin = duplicate(model)
    original = [p.detach().clone() for p in model.parameters()]
    svi = SVI(twin, RankDiagonal(twin), AdamW(lr=0.1), loss=RankELBO())
    for _ in range(2):
        svi.step(**batch)
    close([p.detach() for p in model.parameters()], original, rtol=0, atol=0)
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            moved = parameter - model.get_parameter(name)
            assert moved.abs().max() > 1e-3, name


def test_a_bert_model_pickles_with_its_hooks() -> None:
    model = GateLoRA(nets.bert(), num_data=6)
    twin = through_pickle(model)
    assert isinstance(twin.base_net.base_model.model, BertForSequenceClassification)
    batch, gate = nets.tokens(labels=False), torch.rand(model.space.size)
    with model.bind(gate), twin.bind(gate):
        close(twin.predictions(**batch), model.predictions(**batch), rtol=0, atol=0)
