"""PEFT disables, merges, replaces or deletes an adapter after RankSpace found it."""

import nets
import torch
from nets import refused
from peft import LoraConfig
from peft.helpers import DoraCaching
from torch import nn

from lrvd_pyro import RankSpace

close = torch.testing.assert_close


def test_a_disabled_adapter_is_refused_and_works_again_afterwards() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    with net.disable_adapter():
        refused(space, r"'default' is disabled in 'hidden'.*leave net.disable_adapter")
    with space.bind(torch.ones(space.size)):
        net(torch.randn(2, 5))


def test_disabling_the_adapter_within_a_draw_gives_the_base_network() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    x = torch.randn(2, 5)
    with space.bind(torch.full((space.size,), 5.0)), net.disable_adapter():
        close(net(x), net.get_base_model()(x))
    with space.bind(torch.zeros(space.size)):
        zero = net(x)
    with net.disable_adapter():
        close(net(x), zero)


def test_a_merged_adapter_would_lose_its_gate_and_is_refused() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    net.merge_adapter()
    refused(space, r"'default' is merged in 'hidden'.*call net.unmerge_adapter\(\)")
    net.unmerge_adapter()
    with space.bind(torch.ones(space.size)):
        net(torch.randn(2, 5))


def test_an_inactive_adapter_is_refused_until_it_is_set_again() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    net.add_adapter("other", LoraConfig(r=2, target_modules=["hidden", "out"]))
    net.set_adapter("other")
    refused(space, r"'default' is not active.*call net.set_adapter\('default'\)")
    net.set_adapter("default")
    with space.bind(torch.ones(space.size)):
        net(torch.randn(2, 5))


def test_a_deleted_adapter_is_refused() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    net.add_adapter("other", LoraConfig(r=2, target_modules=["hidden", "out"]))
    net.set_adapter("other")
    net.delete_adapter("default")
    refused(space, "'default' was deleted in 'hidden'.*build the model on another")
    space.close()


def test_an_adapter_deleted_and_added_again_is_refused() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    config = LoraConfig(r=4, target_modules=["hidden", "out"])
    net.add_adapter("other", config)
    net.set_adapter("other")
    net.delete_adapter("default")
    net.add_adapter("default", config)
    net.set_adapter("default")
    refused(
        space, "'default' was replaced, or its RankSpace closed.*make the model again"
    )


def test_an_unloaded_adapter_is_refused() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    net.unload()
    refused(space, "'default' was unloaded from the network.*make the model again")


def test_doras_cache_of_weight_norms_is_refused() -> None:
    net = nets.perceptron(use_dora=True).eval()
    space = RankSpace(net)
    with DoraCaching():
        refused(space, "has a cached weight norm in 'hidden'.*leave .*DoraCaching")
    with space.bind(torch.ones(space.size)):
        net(torch.randn(2, 5))


def test_the_other_active_adapter_is_not_gated() -> None:
    net = nets.perceptron()
    net.add_adapter("other", LoraConfig(r=2, target_modules=["out"]))
    nn.init.normal_(net.get_submodule("base_model.model.out").lora_B["other"].weight)
    space = RankSpace(net, "default")
    x = torch.randn(2, 5)
    net.set_adapter("other")
    other = net(x)
    net.base_model.set_adapter(["default", "other"])
    with space.bind(torch.zeros(space.size)):
        close(net(x), other)
