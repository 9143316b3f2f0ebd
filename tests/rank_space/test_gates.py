"""A gate scales the rank components of every kind of LoRA layer."""

from collections.abc import Callable
from typing import Any

import nets
import pytest
import torch
from nets import RAGGED, flat, folded
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from lrvd_pyro import RankELBO, RankSpace
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA

close = torch.testing.assert_close


def words() -> dict[str, Tensor]:
    return nets.tokens(4, labels=False)


def images() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 3, 7, 7)}


def vectors() -> dict[str, Tensor]:
    return {"x": torch.randn(4, 5)}


def logits(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    output = net(**batch)
    return getattr(output, "logits", output)


Make = Callable[[], PeftModel]
Batch = Callable[[], dict[str, Tensor]]
PER_EXAMPLE: dict[str, tuple[Make, Batch]] = {
    "Linear": (nets.bert, words),
    "Conv1D": (nets.gpt2, words),
    "Conv2d": (nets.conv, images),
    "rsLoRA": (lambda: nets.perceptron(use_rslora=True), vectors),
    "ragged": (lambda: nets.perceptron(**RAGGED), vectors),
}
KINDS: dict[str, tuple[Make, Batch]] = PER_EXAMPLE | {
    "DoRA": (lambda: nets.bert(use_dora=True), words),
    "DoRA on Conv1D": (lambda: nets.gpt2(use_dora=True), words),
}


# Layer kind by layer kind


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_a_gate_in_the_forward_pass_equals_the_gate_folded_into_the_weights(
    kind: str, side: str
) -> None:
    make, sample = KINDS[kind]
    net, batch = make().eval(), sample()
    space = RankSpace(net)
    gate = torch.rand(space.size) + 0.5
    plain = logits(net, batch)
    with space.bind(gate):
        gated = logits(net, batch)
    with folded(space, gate, side):
        close(gated, logits(net, batch), rtol=1e-10, atol=1e-12)
    assert (gated - plain).abs().max() > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_gate_zero_is_the_base_network_and_gate_one_is_plain_lora(kind: str) -> None:
    make, sample = KINDS[kind]
    net, batch = make().eval(), sample()
    space = RankSpace(net)
    with net.disable_adapter():
        base = logits(net, batch)
    plain = logits(net, batch)
    with space.bind(torch.zeros(space.size)):
        close(logits(net, batch), base, rtol=1e-10, atol=1e-12)
    with space.bind(torch.ones(space.size)):
        close(logits(net, batch), plain, rtol=0, atol=0)
    assert (plain - base).abs().max() > 1e-6


@pytest.mark.parametrize("kind", PER_EXAMPLE)
def test_per_example_gates_treat_each_example_as_if_it_were_alone(kind: str) -> None:
    make, sample = PER_EXAMPLE[kind]
    net, batch = make().eval(), sample()
    space = RankSpace(net)
    gates = torch.randn(4, space.size)
    with space.bind(gates):
        together = logits(net, batch)
    for b, gate in enumerate(gates):
        with space.bind(gate):
            alone = logits(net, {k: v[b : b + 1] for k, v in batch.items()})
        close(together[b : b + 1], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_every_dimension_are_gated_with_and_without_a_batch_axis(
    dims: int,
) -> None:
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    net = nets.lora(nn.Sequential(convolution(2, 3, 2)), r=4, target_modules=["0"])
    space = RankSpace(net)
    x, gate = torch.randn(3, 2, *[4] * dims), torch.randn(4)
    with space.bind(gate):
        batched, single = net(x), net(x[0])
    with folded(space, gate, "lora_B"):
        close(batched, net(x))
        close(single, net(x[0]))


def test_per_example_gates_scale_every_position_of_a_sequence() -> None:
    net = nets.regression(features=5, r=3, outputs=2)
    space = RankSpace(net)
    x, gates = torch.randn(2, 7, 5), torch.randn(2, 3)
    (a,), (b,) = space.weights("lora_A"), space.weights("lora_B")
    base = net.get_submodule("base_model.model.linear").base_layer.weight
    with space.bind(gates):
        expected = x @ base.T + ((x @ a.T) * gates[:, None, :]) @ b.T
        close(net(x), expected)


def test_the_gate_gets_the_gradient_of_the_formula() -> None:
    net = nets.regression(features=5, r=3, outputs=2)
    space = RankSpace(net)
    x, gate = torch.randn(4, 5), torch.rand(4, 3, requires_grad=True)
    with space.bind(gate):
        net(x).sum().backward()
    (a,), (b,) = space.weights("lora_A"), space.weights("lora_B")
    close(gate.grad, F.linear(x, a) * b.sum(0))


def test_a_gate_of_the_wrong_length_or_rank_is_refused() -> None:
    space = RankSpace(nets.regression(r=3))
    for shape in ((2,), (4, 2), (1, 4, 3)):
        with pytest.raises(ValueError, match=r"gate has shape .*expected \(3,\) or"):
            with space.bind(torch.ones(shape)):
                pass


# Rows of the network and examples of the batch


def test_consecutive_rows_of_a_multiple_choice_share_their_examples_gate() -> None:
    net = nets.multiple_choice().eval()
    space = RankSpace(net)
    batch = {"input_ids": torch.randint(0, 50, (3, 4, 5))}
    gates = torch.rand(3, space.size)
    with space.bind(gates):
        together = logits(net, batch)
    assert together.shape == (3, 4)
    for b in range(3):
        with space.bind(gates[b]):
            alone = logits(net, {"input_ids": batch["input_ids"][b : b + 1]})
        close(together[b : b + 1], alone, rtol=1e-10, atol=1e-12)


def test_the_elbo_draws_a_gate_for_each_label_of_a_multiple_choice() -> None:
    model = GateLoRA(nets.multiple_choice(), num_data=6)
    batch = {
        "input_ids": torch.randint(0, 50, (3, 4, 5)),
        "labels": torch.randint(0, 4, (3,)),
    }
    shapes = []

    def look(*_: Any) -> None:
        if bound := model.space.binding.bank.parts:
            shapes.append(bound["gate"][0].shape)

    model.base_net.register_forward_pre_hook(look)
    RankELBO()(model, RankDiagonal(model))(**batch).backward()
    assert shapes == [(3, 4)]
    assert all(w.grad.abs().max() > 0 for w in model.space.weights("lora_A"))


def test_rows_that_are_not_a_multiple_of_the_examples_name_batch_noise() -> None:
    net = nets.perceptron()
    space = RankSpace(net, sides=("lora_A",))
    message = r'3 examples, but a LoRA layer sees 4 rows.*RankELBO\(noise="batch"\)'
    with pytest.raises(ValueError, match=message):
        with space.bind(torch.ones(3, space.size)):
            net(torch.randn(4, 5))
    with pytest.raises(ValueError, match=message):
        with space.bind_weights(space.flatten("lora_A").expand(3, -1)):
            net(torch.randn(4, 5))


def test_dora_takes_no_draw_per_example_also_where_the_rows_would_fit() -> None:
    net = nets.perceptron(use_dora=True)
    space = RankSpace(net, sides=("lora_A",))
    message = r"DoRA layer 'hidden' takes one draw.*RankELBO\(noise=\"batch\"\)"
    with pytest.raises(ValueError, match=message):
        with space.bind(torch.ones(5, space.size)):
            net(torch.randn(5, 5))
    with pytest.raises(ValueError, match=message):
        with space.bind_weights(space.flatten("lora_A").expand(5, -1)):
            net(torch.randn(5, 5))


def test_another_adapters_dora_does_not_forbid_draws_per_example() -> None:
    net = nets.perceptron()
    net.add_adapter("dora", LoraConfig(r=2, target_modules=["out"], use_dora=True))
    space = RankSpace(net, "default")
    with space.bind(torch.zeros(4, space.size)):
        gated = net(x := torch.randn(4, 5))
    with net.disable_adapter():
        close(gated, net(x))


@pytest.mark.parametrize("kind", ["gates", "weights"])
@pytest.mark.parametrize("image", [False, True])
def test_an_input_without_a_batch_axis_is_one_row(image: bool, kind: str) -> None:
    net = nets.conv() if image else nets.perceptron()
    x = torch.randn(3, 6, 6) if image else torch.randn(5)
    space = RankSpace(net, sides=("lora_A",))
    value = torch.rand(space.size) if kind == "gates" else flat(space)
    bind: Any = space.bind if kind == "gates" else space.bind_weights
    with bind(value):
        expected = net(x)
    with bind(value[None]):
        close(net(x), expected)
    # of rank 4, whose channels are not examples
    with pytest.raises(ValueError, match="2 examples, but a LoRA layer sees 1 rows"):
        with bind(value.expand(2, -1)):
            net(x)
