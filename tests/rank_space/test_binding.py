"""Draws bound within each other, and by several spaces on one network."""

from typing import Any

import nets
import pytest
import torch
from nets import flat, replaced

from lrvd_pyro import RankSpace

close = torch.testing.assert_close
A: tuple[Any, ...] = ("lora_A",)


def test_an_unbound_space_leaves_the_network_as_it_is() -> None:
    net, x = nets.perceptron(), torch.randn(2, 5)
    plain = net(x)
    space = RankSpace(net, sides=("lora_A", "lora_B"))
    close(net(x), plain, rtol=0, atol=0)
    with space.bind(torch.zeros(space.size)):
        assert (net(x) - plain).abs().max() > 1e-3
    close(net(x), plain, rtol=0, atol=0)


def test_two_spaces_on_one_network_do_not_disturb_each_other() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    first, second, third = RankSpace(net), RankSpace(net), RankSpace(net)
    a, b = torch.rand(2, 8)
    with first.bind(a):
        only_a = net(x)
        with second.bind(b):
            both = net(x)
        close(net(x), only_a, rtol=0, atol=0)
    with third.bind(a * b):
        close(net(x), both)
    with third.bind(a):
        close(net(x), only_a, rtol=0, atol=0)


def test_the_innermost_draw_counts_and_the_outer_one_returns() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net)
    plain = net(x)
    a, b = torch.rand(2, 8)
    with space.bind(b):
        only_b = net(x)
    with space.bind(a):
        only_a = net(x)
        with space.bind(b):
            close(net(x), only_b, rtol=0, atol=0)
        close(net(x), only_a, rtol=0, atol=0)
        with pytest.raises(ZeroDivisionError):
            with space.bind(b):
                raise ZeroDivisionError
        close(net(x), only_a, rtol=0, atol=0)
    close(net(x), plain, rtol=0, atol=0)


def test_a_gate_and_drawn_weights_of_one_space_are_both_in_force() -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net, sides=A)
    gate, value = torch.rand(8), torch.randn(len(flat(space)))
    with space.bind(gate), space.bind_weights(value):
        both = net(x)
    with space.bind_weights(value), space.bind(gate):
        close(both, net(x), rtol=0, atol=0)
    with space.bind(gate), replaced(space, value):
        close(both, net(x), rtol=1e-10, atol=1e-12)
