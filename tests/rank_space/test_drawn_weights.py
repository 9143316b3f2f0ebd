"""Weights drawn for LoRA layers replace the weights of the layers."""

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import flat, replaced
from peft import PeftModel
from torch import Tensor, nn

from lrvd_pyro import RankSpace

close = torch.testing.assert_close
A: tuple[Any, ...] = ("lora_A",)
AB: tuple[Any, ...] = ("lora_A", "lora_B")
WEIGHED: dict[str, tuple[Callable[[], PeftModel], Callable[[], Any]]] = {
    "Linear": (nets.perceptron, lambda: torch.randn(3, 7, 5)),
    "ragged": (
        lambda: nets.perceptron(rank_pattern={"out": 2}),
        lambda: torch.randn(3, 5),
    ),
    "lora_bias": (lambda: with_biases(), lambda: torch.randn(3, 7, 5)),
    "Conv1D": (lambda: nets.gpt2().eval(), lambda: torch.randint(0, 50, (3, 4))),
}


def with_biases() -> PeftModel:
    net = nets.perceptron(lora_bias=True)
    for name, parameter in net.named_parameters():
        if name.endswith("lora_B.default.bias"):
            nn.init.normal_(parameter)
    return net


def output(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x)
    return getattr(y, "logits", y)


@pytest.mark.parametrize("kind", WEIGHED)
@pytest.mark.parametrize("sides", [A, AB])
def test_bound_weights_equal_replaced_weights(kind: str, sides: Any) -> None:
    make, sample = WEIGHED[kind]
    net, x = make(), sample()
    space = RankSpace(net, sides=sides)
    values = torch.randn(3, len(flat(space)))
    with space.bind_weights(values[0]):
        shared = output(net, x)
    with replaced(space, values[0]):
        close(shared, output(net, x), rtol=1e-10, atol=1e-12)
    with space.bind_weights(values):
        each = output(net, x)
    for b, value in enumerate(values):
        with replaced(space, value):
            close(each[b], output(net, x)[b], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sides", [A, AB])
def test_the_networks_own_weights_bound_are_the_network(sides: Any) -> None:
    net, x = nets.perceptron(), torch.randn(3, 5)
    space = RankSpace(net, sides=sides)
    with space.bind_weights(flat(space)):
        bound = net(x)
    close(bound, net(x), rtol=1e-12, atol=1e-14)


def test_weights_per_example_serve_consecutive_rows() -> None:
    net, x = nets.perceptron(), torch.randn(6, 5)
    space = RankSpace(net, sides=AB)
    values = torch.randn(3, len(flat(space)))
    with space.bind_weights(values):
        folded = net(x)
    with space.bind_weights(values.repeat_interleave(2, 0)):
        close(folded, net(x))


def test_dora_takes_bound_weights_into_its_norm() -> None:
    net, x = nets.perceptron(use_dora=True), torch.randn(6, 5)
    space = RankSpace(net, sides=AB)
    value = torch.randn(len(flat(space)))
    with space.bind_weights(value):
        bound = net(x)
    with replaced(space, value):
        close(bound, net(x), rtol=1e-10, atol=1e-12)


def test_weights_of_the_wrong_length_are_refused() -> None:
    space = RankSpace(nets.regression(features=5, r=3), sides=A)
    for shape in ((14,), (2, 16), (1, 1, 15)):
        with pytest.raises(ValueError, match=r"drawn weights have shape .*\(15,\) or"):
            with space.bind_weights(torch.ones(shape)):
                pass


def test_dora_refuses_drawn_weights_and_gates_per_example() -> None:
    """As many examples as B has rows: the rows of its norm's identity would fit."""
    net, x = nets.perceptron(use_dora=True), torch.randn(5, 5)
    space = RankSpace(net, sides=AB)
    values = flat(space).expand(5, -1)
    message = "DoRA layer 'hidden' takes one draw .*RankELBO\\(noise=\"batch\"\\)"
    for bind, rows in ((space.bind_weights, values), (space.bind, torch.ones(5, 8))):
        with pytest.raises(ValueError, match=message):
            with bind(rows):
                net(x)
