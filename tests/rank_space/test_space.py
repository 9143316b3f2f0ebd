"""RankSpace indexes the rank components of a LoRA model, or says why it cannot."""

import nets
import pytest
import torch
from nets import RAGGED, hooks, refused
from peft import IA3Config, LoraConfig, get_peft_model

from lrvd_pyro import RankSpace

close = torch.testing.assert_close


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
    message = r"\['default', 'other'\] are active; expected one .*set_adapter\(name\)"
    with pytest.raises(ValueError, match=message):
        RankSpace(net)
    net.set_adapter("default")
    assert RankSpace(net).size == 8


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


# Closing


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
    refused(space, "its RankSpace closed, in 'hidden'.*make the model again")


def test_closing_one_space_leaves_the_other_ones_hooks() -> None:
    net = nets.perceptron()
    first, second = RankSpace(net), RankSpace(net)
    first.close()
    x = torch.randn(2, 5)
    with net.disable_adapter():
        base = net(x)
    with second.bind(torch.zeros(second.size)):
        close(net(x), base)
