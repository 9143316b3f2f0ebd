"""The check of which row belongs to which example, by what it finds and leaves."""

from typing import Any

import mixed
import nets
import pytest
import torch
from mixed import MIXED, Make, texts
from torch import Tensor, nn

from lrvd_pyro import RankSpace
from lrvd_pyro.rank_space.row_check import mixed_rows


def reason(net: Any, batch: dict[str, Any], size: int) -> str:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    space = RankSpace(net)

    def predict() -> Tensor:
        output = net(**inputs)
        return getattr(output, "logits", output)

    found, seen = mixed_rows(space, predict, size)
    assert found or seen == set(space.modules)
    return found


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("make", MIXED, ids=lambda make: make.__name__)
def test_the_first_layer_of_foreign_rows_is_named_whatever_b_is(
    make: Make, trained: bool
) -> None:
    found = reason(make(randomize=trained), texts(), mixed.EXAMPLES)
    assert f"LoRA layer {MIXED[make]!r}" in found


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("size", [2, 5, 6])
def test_rows_in_the_order_of_the_examples_pass(size: int, trained: bool) -> None:
    for make in (nets.bert, nets.gpt2):
        net, batch = make(randomize=trained), nets.tokens(size)
        assert reason(net, batch, size) == ""
    choices = nets.tokens(size)["input_ids"][:, None].repeat(1, 3, 1)
    assert reason(nets.multiple_choice(), {"input_ids": choices}, size) == ""
    images = torch.randn(size, 3, 6, 6)
    assert reason(nets.conv(randomize=trained), {"x": images}, size) == ""


class Turned(nn.Module):
    """Examples whose rows the layer sees in another order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order, self.layer = order, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        back = torch.tensor(self.order).argsort()
        return self.layer(x[self.order])[back]


def test_any_two_examples_that_trade_rows_are_found() -> None:
    size = 6
    for i in range(size):
        for j in range(i):
            order = [*range(size)]
            order[i], order[j] = j, i
            net = nets.lora(Turned(order), target_modules=["layer"])
            assert "'layer'" in reason(net, {"x": torch.randn(size, 5)}, size)
    net = nets.lora(Turned([*range(size)]), target_modules=["layer"])
    assert reason(net, {"x": torch.randn(size, 5)}, size) == ""


class Normed(nn.Module):
    """What follows a layer may hide a shift of it that is the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.out = nn.Linear(5, 8), nn.Linear(8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        # rows in backward order, in each of the layers
        key = self.key(x.flip(0)).flip(0)
        h = self.norms[0](key.softmax(1) @ key.mT.softmax(1) @ key)
        return self.norms[1](self.out(h.flip(0)).flip(0)).flatten(1)


@pytest.mark.parametrize("target", ["key", "out"])
def test_layer_norms_and_softmaxes_hide_nothing(target: str) -> None:
    net = nets.lora(Normed(), target_modules=[target])
    found = reason(net, {"x": torch.randn(4, 6, 5)}, 4)
    assert f"{target!r} the draw of one example" in found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_give_no_false_alarm(dtype: torch.dtype) -> None:
    net = nets.bert().to(dtype)
    assert reason(net, nets.tokens(), 6) == ""
    assert "query" in reason(mixed.longformer().to(dtype), texts(), 4)


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning"
)
def test_dropout_and_checkpointing_do_not_disturb_it() -> None:
    for make in (nets.bert, mixed.pairs):
        net = make().train()
        for module in net.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.3
            if hasattr(module, "gradient_checkpointing_enable"):
                module.gradient_checkpointing_enable()
        assert bool(reason(net, texts(6), 6)) == (make is mixed.pairs)


class Normalized(nn.Module):
    """Batch normalization behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def test_batch_normalization_mixes_examples_in_training_alone() -> None:
    net = nets.lora(Normalized(), target_modules=["layer"])
    batch = {"x": torch.randn(6, 5)}
    assert "batch normalization" in reason(net.train(), batch, 6)
    assert reason(net.eval(), batch, 6) == ""


def test_it_leaves_hooks_buffers_gradients_and_random_state_as_they_were() -> None:
    net = nets.lora(Normalized(), target_modules=["layer"]).train()
    space = RankSpace(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state, hooks = torch.get_rng_state(), nets.hooks(net)

    def predict() -> Tensor:
        return net(x=torch.randn(6, 5))

    mixed_rows(space, predict, 6)
    assert torch.equal(state, torch.get_rng_state()) and hooks == nets.hooks(net)
    assert all(torch.equal(before[n], value) for n, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    predict()
    assert not torch.equal(
        before["base_model.model.norm.running_mean"],
        net.state_dict()["base_model.model.norm.running_mean"],
    )


def test_predictions_that_are_not_finite_say_nothing() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    x = torch.full((4, 5), torch.nan)
    assert mixed_rows(space, lambda: net(x=x), 4) == ("", set())


def test_predictions_that_are_not_one_row_an_example_are_named() -> None:
    net = nets.perceptron()
    found = reason(net, {"x": torch.randn(8, 5)}, 4)
    assert found == "the network returns 8 rows of predictions for 4 examples"


@pytest.mark.parametrize("absent", [0.0, float("-inf")])
def test_infinite_logits_hide_nothing_and_accuse_nobody(absent: float) -> None:
    x = torch.randn(4, 4, 5)
    net = nets.lora(mixed.TimeFirst(absent), target_modules=["layer"])
    assert "LoRA layer 'layer'" in reason(net, {"x": x}, 4)

    class Plain(mixed.TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1) + torch.tensor([0.0, 0.0, self.absent])

    net = nets.lora(Plain(absent), target_modules=["layer"])
    assert reason(net, {"x": x}, 4) == ""


def test_a_buffer_that_is_one_number_many_times_is_left_alone() -> None:
    net = nets.lora(mixed.Either(), target_modules=["layer"])
    net.get_base_model().register_buffer("ids", torch.zeros(1).expand(7))
    assert reason(net, {"x": torch.randn(4, 4, 5)}, 4) == ""
