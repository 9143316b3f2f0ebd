"""What an error leaves: modules, tensors, containers and generators as they were."""

import random
from pathlib import Path
from typing import Any

import damaged
import nets
import numpy as np
import pytest
import torch
from torch import nn

from lrvd_pyro.models import GateLoRA
from lrvd_pyro.storage.transaction import told_of, unchanged_on_error


class Stop(Exception):
    """The error of these tests."""


def harm(net: Any) -> None:
    """Most of what setting up an adapter or restoring a run may do."""
    layer = net.base_model.model.hidden
    layer.extra = nn.Linear(2, 2)
    del layer.lora_A["default"]
    net.base_model.model.out = nn.Identity()
    net.requires_grad_(False).train()
    net.register_buffer("more", torch.ones(1))
    net.register_forward_hook(lambda *_: None)
    for parameter in net.parameters():
        parameter.data = torch.zeros(1)
    torch.rand(3), random.random(), np.random.rand()


def test_a_network_is_what_it_was_bit_for_bit() -> None:
    net = nets.perceptron().eval()
    model = GateLoRA(net, num_data=20)
    parts = {id(m) for m in model.modules()} | {id(p) for p in model.parameters()}
    draws = random.getstate(), np.random.get_state()[2]
    before, hooks = damaged.state_of(model), len(net._forward_hooks)
    with pytest.raises(Stop):
        with unchanged_on_error(model):
            harm(net)
            raise Stop
    assert damaged.state_of(model) == before and len(net._forward_hooks) == hooks
    after = {id(m) for m in model.modules()} | {id(p) for p in model.parameters()}
    assert parts == after
    assert (random.getstate(), np.random.get_state()[2]) == draws


def test_without_an_error_changes_stay() -> None:
    net = nets.perceptron()
    before = damaged.state_of(net)
    with unchanged_on_error(net):
        harm(net)
    assert damaged.state_of(net) != before


def test_numbers_written_in_place_come_back_where_they_were_named() -> None:
    net = nets.perceptron()
    first, *rest = net.parameters()
    before = first.detach().clone()
    with pytest.raises(Stop):
        with unchanged_on_error(net, values=[first]), torch.no_grad():
            first.zero_()
            rest[0].zero_()
            raise Stop
    assert torch.equal(first, before) and not rest[0].any()


def test_the_state_of_an_optimizer_comes_back() -> None:
    net = nets.perceptron()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = repr(optimizer.state_dict())
    other = torch.optim.AdamW(weights, lr=7.0).state_dict()
    with pytest.raises(Stop):
        with unchanged_on_error(optimizer):
            optimizer.load_state_dict(other)
            optimizer.param_groups[0]["params"].pop()
            raise Stop
    assert repr(optimizer.state_dict()) == before


def test_an_error_tells_what_was_read() -> None:
    with pytest.raises(Stop) as told:
        with told_of(Path("run")):
            raise Stop
    assert told.value.__notes__ == ["while reading or writing run"]
    with pytest.raises(Stop) as named:
        with told_of(Path("run")):
            raise Stop("run is damaged")
    assert not hasattr(named.value, "__notes__")
