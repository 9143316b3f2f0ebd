"""RankSpace finds the rank components of any LoRA model, or says why it cannot."""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import nets
import peft
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.helpers import DoraCaching
from peft.tuners.lora.config import VeloraConfig
from torch import Tensor, nn

from lrvd_pyro import RankELBO, RankSpace
from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import FactorLoRA, GateLoRA

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


@contextmanager
def folded(space: RankSpace, gate: Tensor, side: str) -> Iterator[None]:
    """The gates multiplied into the weights, for as long as the block lasts."""
    weights = space.weights(side)
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, z in zip(weights, space.split(gate).values()):
            w *= z.view(-1, *[1] * (w.dim() - (1 if side == "lora_A" else 2)))
    yield
    with torch.no_grad():
        for w, old in zip(weights, before):
            w.copy_(old)


Make = Callable[[], PeftModel]
Batch = Callable[[], dict[str, Tensor]]
RAGGED = {"rank_pattern": {"hidden": 2}, "alpha_pattern": {"hidden": 3}}
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


# What it finds


def test_rank_components_are_indexed_in_the_order_of_the_modules() -> None:
    net = nets.bert(rank_pattern={"layer.1.attention.self.value": 2})
    space = RankSpace(net)
    query, value = "bert.encoder.layer.{}.attention.self.query", "attention.self.value"
    assert space.modules[0] == query.format(0)
    assert space.modules[2] == query.format(1)
    assert space.ranks == (4, 4, 4, 2)
    assert space.size == 14
    assert [tuple(w.shape) for w in space.weights("lora_A")] == [(4, 16)] * 3 + [
        (2, 16)
    ]
    table = space.coordinates
    assert {len(column) for column in table.values()} == {14}
    assert table["module"][-1] == "bert.encoder.layer.1.attention.self.value"
    assert table["type"][-3:] == ["attention.self.query", value, value]
    assert table["layer"] == [0] * 8 + [1] * 6
    assert table["rank"] == [0, 1, 2, 3] * 3 + [0, 1]


def test_a_module_without_a_number_is_of_layer_minus_one_and_its_own_type() -> None:
    table = RankSpace(nets.regression(r=3)).coordinates
    assert table == {
        "module": ["linear"] * 3,
        "type": ["linear"] * 3,
        "layer": [-1] * 3,
        "rank": [0, 1, 2],
    }


def test_split_cuts_the_last_axis_into_the_modules_slices() -> None:
    space = RankSpace(nets.perceptron(**RAGGED))
    vector = torch.arange(12.0).view(2, 6)
    parts = space.split(vector)
    assert list(parts) == list(space.modules) == ["hidden", "out"]
    close(parts["hidden"], vector[:, :2])
    close(parts["out"], vector[:, 2:])


def test_flatten_and_widths_go_rank_component_by_rank_component() -> None:
    space = RankSpace(nets.perceptron(**RAGGED))
    for side, width in (("lora_A", [5, 5, 6, 6, 6, 6]), ("lora_B", [6, 6, 3, 3, 3, 3])):
        assert space.widths(side).tolist() == width
        rows = space.flatten(side).split(width)
        hidden, out = space.weights(side)
        close(rows[1], hidden[1] if side == "lora_A" else hidden[:, 1])
        close(rows[5], out[3] if side == "lora_A" else out[:, 3])


def test_the_single_active_adapter_is_taken_and_another_only_by_name() -> None:
    net = nets.perceptron()
    net.add_adapter("other", LoraConfig(r=2, target_modules=["out"]))
    assert RankSpace(net).adapter == "default"
    other = RankSpace(net, "other")
    assert (other.modules, other.ranks) == (("out",), (2,))


def test_several_active_adapters_are_ambiguous() -> None:
    net = nets.perceptron()
    net.add_adapter("other", LoraConfig(r=2, target_modules=["out"]))
    net.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match=r"\['default', 'other'\] are active; name one"
    ):
        RankSpace(net)
    assert RankSpace(net, "default").size == 8


def test_an_unknown_adapter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'typo' is unknown; .* \['default'\]"):
        RankSpace(nets.perceptron(), "typo")


def test_a_network_without_peft_is_refused() -> None:
    with pytest.raises(TypeError, match="is a Perceptron; expected a PEFT model"):
        RankSpace(nets.Perceptron())


def test_an_adapter_without_lora_layers_is_refused() -> None:
    config = IA3Config(target_modules=["out"], feedforward_modules=[])
    with pytest.raises(ValueError, match="'default' has no LoRA layer; inject one"):
        RankSpace(get_peft_model(nets.Perceptron(), config))


# Gates, layer kind by layer kind


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
        shapes.append(model.space.bank.parts["gate"][0].shape)

    model.base_net.register_forward_pre_hook(look)
    RankELBO()(model, RankDiagonal(model))(**batch).backward()
    assert shapes == [(3, 4)]
    assert all(w.grad.abs().max() > 0 for w in model.space.weights("lora_A"))


def test_rows_that_are_no_multiple_of_the_examples_name_batch_noise() -> None:
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


# What is refused


class Assorted(nn.Module):
    """One of each layer kind that a hook on lora_B would miss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.idle = nn.Linear(8, 8)

    def prepare_inputs_for_generation(self) -> None:
        """PEFT's causal language models must have it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.linear(self.attention(h, h, h)[0])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Embedding": (
        {"target_modules": ["embed"]},
        "'embed' is a LoRA Embedding layer.*leave it out of target_modules",
    ),
    "MultiheadAttention": (
        {"target_modules": ["attention"]},
        "'attention' is a LoRA MultiheadAttention layer.*leave it out",
    ),
    "out_proj": (
        {"target_modules": ["attention.out_proj", "linear"]},
        "'attention.out_proj' belongs to an nn.MultiheadAttention.*leave it out",
    ),
    "target_parameters": (
        {"target_modules": [], "target_parameters": ["linear.weight"]},
        "'linear' is a LoRA ParamWrapper layer.*leave it out",
    ),
    "VeLoRA": (
        {"target_modules": ["linear"], "velora_config": VeloraConfig()},
        "'linear' uses VeloraLinearVariant.*plain LoRA, rsLoRA, or DoRA on linear",
    ),
    "aLoRA": (
        {
            "target_modules": ["linear"],
            "alora_invocation_tokens": [1],
            "task_type": "CAUSAL_LM",
        },
        "'linear' uses ALoraLinearVariant.*plain LoRA, rsLoRA, or DoRA on linear",
    ),
    "DoRA on Conv2d": (
        {"target_modules": ["conv"], "use_dora": True},
        "'conv' uses DoraConv2dVariant.*plain LoRA, rsLoRA, or DoRA on linear",
    ),
    "lora_bias": (
        {"target_modules": ["linear"], "lora_bias": True},
        r"'linear' has lora_bias=True.*use LoraConfig\(lora_bias=False\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_cannot_be_gated_is_refused_with_the_way_out(kind: str) -> None:
    config, message = REFUSED[kind]
    net = nets.lora(Assorted(), **config)
    with pytest.raises(TypeError, match=message):
        RankSpace(net)
    assert hooks(net) == 0


def test_drawn_weights_need_linear_layers() -> None:
    message = "'first' is a LoRA Conv2d layer; drawn weights.*use models.GateLoRA"
    with pytest.raises(TypeError, match=message):
        FactorLoRA(nets.conv(), num_data=10)


def test_a_module_that_the_first_forward_pass_does_not_reach_is_an_error() -> None:
    net = nets.lora(Assorted(), target_modules=["linear", "idle"])
    space = RankSpace(net)
    with pytest.raises(
        RuntimeError, match=r"never reached .*\['idle'\].*leave them out"
    ):
        with space.bind(torch.ones(space.size)):
            net(torch.randint(0, 10, (2, 3)))


def test_a_model_none_of_whose_modules_is_reached_is_an_error() -> None:
    model = GateLoRA(nets.lora(Assorted(), target_modules=["idle"]), num_data=10)
    with pytest.raises(RuntimeError, match=r"never reached .*\['idle'\]"):
        model(x=torch.randint(0, 10, (2, 3)))


def test_a_later_pass_may_leave_modules_out() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    with space.bind(torch.ones(space.size)):
        net(torch.randn(2, 5))
    with space.bind(torch.ones(space.size)):
        net.get_submodule("base_model.model.hidden")(torch.randn(2, 5))


def test_lora_dropout_is_one_warning() -> None:
    net = nets.perceptron(lora_dropout=0.1)
    with pytest.warns(UserWarning, match="lora_dropout=0.1 in 'hidden'") as caught:
        RankSpace(net)
    assert len(caught) == 1


# What PEFT may do to the adapter meanwhile


def refused(space: RankSpace, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        with space.bind(torch.ones(space.size)):
            pytest.fail("entered")


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
        space, "'default' was replaced, or its RankSpace closed.*build the model anew"
    )


def test_an_unloaded_adapter_is_refused() -> None:
    net = nets.perceptron()
    space = RankSpace(net)
    net.unload()
    refused(space, "'default' was unloaded from the network.*build the model anew")


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


# Closing, copying


def hooks(net: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())


def test_closing_leaves_no_trace_and_draws_are_refused_from_then_on() -> None:
    net = nets.perceptron()
    before = (repr(net), hooks(net), list(net.state_dict()), net(x := torch.ones(2, 5)))
    space = RankSpace(net, sides=("lora_A", "lora_B"))
    assert hooks(net) == 6
    with space.bind(torch.zeros(space.size)):
        net(x)
    space.close()
    after = (repr(net), hooks(net), list(net.state_dict()), net(x))
    assert after[:3] == before[:3]
    close(after[3], before[3], rtol=0, atol=0)
    refused(space, "its RankSpace closed, in 'hidden'.*build the model anew")


def test_closing_one_space_leaves_the_other_ones_hooks() -> None:
    net = nets.perceptron()
    first, second = RankSpace(net), RankSpace(net)
    first.close()
    x = torch.randn(2, 5)
    with net.disable_adapter():
        base = net(x)
    with second.bind(torch.zeros(second.size)):
        close(net(x), base)


def test_an_unbound_space_leaves_the_network_as_it_is() -> None:
    net, x = nets.perceptron(), torch.randn(2, 5)
    plain = net(x)
    space = RankSpace(net, sides=("lora_A", "lora_B"))
    close(net(x), plain, rtol=0, atol=0)
    with space.bind(torch.zeros(space.size)):
        assert (net(x) - plain).abs().max() > 1e-3
    close(net(x), plain, rtol=0, atol=0)


def through_pickle(model: GateLoRA) -> GateLoRA:
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


# Precision


def test_bfloat16_adapters_take_gates_of_another_precision() -> None:
    net = nets.Perceptron().bfloat16()
    config = LoraConfig(r=4, target_modules=["hidden", "out"])
    net = get_peft_model(net, config, autocast_adapter_dtype=False)
    space = RankSpace(net, sides=("lora_A",))
    for w in space.weights("lora_B"):
        nn.init.normal_(w)
    x = torch.randn(3, 5).bfloat16()
    for gate in (torch.zeros(8).float(), torch.zeros(3, 8).double()):
        with space.bind(gate):
            gated = net(x)
        with net.disable_adapter():
            close(gated, net(x), rtol=0, atol=0)
    with space.bind_weights(space.flatten("lora_A").float()):
        drawn = net(x)
    assert drawn.dtype == torch.bfloat16
    close(drawn, net(x), rtol=0, atol=0)


def test_under_autocast_a_gate_equals_the_gate_folded_into_the_weights() -> None:
    net = nets.perceptron().float()
    space = RankSpace(net, sides=("lora_A", "lora_B"))
    x = torch.randn(3, 5).float()
    gate = 2.0 ** torch.randint(-2, 3, (8,))  # powers of two: exact in bfloat16
    weights = torch.cat([space.flatten("lora_A"), space.flatten("lora_B")])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with space.bind(gate):
            gated = net(x)
        with space.bind(torch.full((8,), 4.0)):
            fourfold = net(x)
        with space.bind_weights(2 * weights):
            close(net(x), fourfold, rtol=0, atol=0)
    with folded(space, gate, "lora_B"), torch.autocast("cpu", dtype=torch.bfloat16):
        close(gated, net(x), rtol=0, atol=0)
    assert gated.dtype == torch.bfloat16


# Quantised layers


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_are_gated(bits: int) -> None:
    bnb = pytest.importorskip(
        "bitsandbytes", reason="the 4- and 8-bit layers are those of bitsandbytes"
    )
    torch.set_default_dtype(torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
    options = {} if bits == 4 else {"has_fp16_weights": False}
    base = nn.Sequential(layer(64, 64, bias=False, **options)).to(device)
    setattr(base, f"is_loaded_in_{bits}bit", True)
    net = nets.lora(base, target_modules=["0"]).eval()
    space = RankSpace(net)
    assert type(space.layers[0]) is not peft.tuners.lora.Linear
    x = torch.randn(3, 64, device=device)
    gate = torch.rand(space.size, device=device)
    plain = net(x)
    with space.bind(gate):
        gated = net(x)
    with folded(space, gate, "lora_B"):
        close(gated, net(x))
    assert (gated - plain).abs().max() > 1e-3
