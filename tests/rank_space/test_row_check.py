"""The check of which row belongs to which example, by what it finds and leaves."""

from typing import Any

import mixed
import nets
import pytest
import torch
from mixed import MIXED, Make, texts
from torch import Tensor, nn

import lrvd_pyro as lrvd
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


class TimeFirst(nn.Module):
    """Its layer has the sequence first; some choices are absent."""

    def __init__(self, absent: float) -> None:
        super().__init__()
        self.layer, self.absent = nn.Linear(5, 3), absent

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layer(x.transpose(0, 1)).mean(0)
        return logits + torch.tensor([0.0, 0.0, self.absent])


@pytest.mark.parametrize("absent", [0.0, float("-inf")])
def test_infinite_logits_hide_nothing_and_accuse_nobody(absent: float) -> None:
    x = torch.randn(4, 4, 5)
    net = nets.lora(TimeFirst(absent), target_modules=["layer"])
    assert "LoRA layer 'layer'" in reason(net, {"x": x}, 4)

    class Plain(TimeFirst):
        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean(1) + torch.tensor([0.0, 0.0, self.absent])

    net = nets.lora(Plain(absent), target_modules=["layer"])
    assert reason(net, {"x": x}, 4) == ""


class Gated(TimeFirst):
    """A branch behind a factor that starts at 0, as ReZero and LayerScale have it."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self.factor = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * super().forward(x) + x.mean(1)[:, :3]


def gated_model() -> tuple[Any, dict[str, Tensor]]:
    net = nets.lora(Gated(), target_modules=["layer"])
    batch = {"x": torch.randn(4, 4, 5), "labels": torch.tensor([0, 1, 2, 0])}
    return lrvd.models.GateLoRA(net, num_data=4), batch


def test_a_branch_that_moves_nothing_yet_is_looked_at_again() -> None:
    model, batch = gated_model()
    assert model.mixed_rows(batch) == ""
    with torch.no_grad():
        model.base_net.get_base_model().factor.fill_(1.0)
    assert "LoRA layer 'layer'" in model.mixed_rows(batch)


class Either(nn.Module):
    """An option decides the layout, and so does the number of dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, time_first: bool = False) -> Tensor:
        if time_first or x.dim() == 4:
            x = x.flatten(1, -2)
            return self.layer(x.transpose(0, 1)).mean(0)
        return self.layer(x).mean(1)


class Sorted(nn.Module):
    """Sorts the examples by length, and leaves them sorted for the LoRA layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        order = lengths.argsort(descending=True)
        return self.layer(x[order])[order.argsort()]


@pytest.mark.parametrize(
    "lengths", [[2, 1], [1, 2], [3, 2, 1], [3, 2, 4], [4, 3, 2, 1]]
)
def test_a_network_that_sorts_shows_it_on_a_batch_of_any_order(lengths: Any) -> None:
    net = nets.lora(Sorted(), target_modules=["layer"])
    model = lrvd.models.GateLoRA(net, num_data=6)
    x = torch.randn(len(lengths), 5)
    before = x.clone()
    reason = model.mixed_rows({"x": x, "lengths": torch.tensor(lengths)})
    assert "LoRA layer 'layer'" in reason and torch.equal(x, before)


class Packed(nn.Module):
    """Takes batches from the longest example to the shortest, and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        pack, unpack = (
            nn.utils.rnn.pack_padded_sequence,
            nn.utils.rnn.pad_packed_sequence,
        )
        x, _ = unpack(pack(x, lengths, batch_first=True), batch_first=True)
        return self.layer(x.sum(1))


class Mapped(nn.Module):
    """Tensors within a mapping, and a list beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Any, lengths: Any = None) -> Tensor:
        assert lengths is None or lengths == x["mask"].sum(1).tolist()
        return self.layer(x["ids"])


@pytest.mark.parametrize("case", ["packed", "mapped", "list", "words"])
def test_inputs_that_bear_no_other_order_are_checked_in_their_own(case: str) -> None:
    ids, mask = torch.randn(3, 5), torch.ones(3, 4).tril(1)
    x = {"ids": ids, "mask": mask}
    batch: dict[str, Any]
    batch = {
        "packed": {"x": torch.randn(3, 4, 5), "lengths": torch.tensor([4, 3, 1])},
        "mapped": {"x": x},
        "list": {"x": x, "lengths": mask.sum(1).tolist()},
        "words": {"x": {"ids": ids.to_sparse()}},
    }[case]
    net = nets.lora(
        Packed() if case == "packed" else Mapped(), target_modules=["layer"]
    )
    model = lrvd.models.GateLoRA(net, num_data=3)
    batch["labels"] = torch.tensor([0, 1, 2])
    assert model.mixed_rows(batch) == ""


def test_examples_keep_their_order_where_a_tensor_has_no_row_for_each() -> None:
    """A second tensor of patches, say, would no longer belong to them."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, counts: Tensor, patches: Tensor) -> Tensor:
            assert counts.tolist() == [1, 2, 3]
            sums = [part.sum(0) for part in patches.split(counts.tolist())]
            return self.layer(torch.stack(sums))

    net = nets.lora(Patches(), target_modules=["layer"])
    model = lrvd.models.GateLoRA(net, num_data=3)
    batch = {"counts": torch.tensor([1, 2, 3]), "patches": torch.randn(6, 5)}
    assert model.mixed_rows(batch) == ""


@pytest.mark.parametrize(
    "later", [{"time_first": True}, {"x": torch.randn(4, 2, 2, 5)}]
)
def test_other_options_and_dimensions_are_a_setting_of_their_own(later: Any) -> None:
    model = lrvd.models.GateLoRA(
        nets.lora(Either(), target_modules=["layer"]), num_data=4
    )
    first = {"x": torch.randn(4, 4, 5), "time_first": False}
    assert model.mixed_rows(first) == ""
    changed = {k: v.double() if isinstance(v, Tensor) else v for k, v in later.items()}
    assert "LoRA layer 'layer'" in model.mixed_rows(first | changed)


def test_batch_normalization_thawed_later_is_a_setting_of_its_own() -> None:
    class Normed(Either):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, time_first: bool = False) -> Tensor:
            return self.norm(super().forward(x))

    net = nets.lora(Normed(), target_modules=["layer"])
    model, batch = lrvd.models.GateLoRA(net, num_data=4), {"x": torch.randn(4, 4, 5)}
    norm = net.get_base_model().norm
    norm.eval()
    assert model.mixed_rows(batch) == ""
    norm.train()
    assert "batch normalization" in model.mixed_rows(batch)


def test_a_buffer_that_is_one_number_many_times_is_left_alone() -> None:
    net = nets.lora(Either(), target_modules=["layer"])
    net.get_base_model().register_buffer("ids", torch.zeros(1).expand(7))
    assert reason(net, {"x": torch.randn(4, 4, 5)}, 4) == ""
