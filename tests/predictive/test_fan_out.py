"""Several draws share what the network computes before its first live LoRA layer."""

from typing import Any

import pytest
import torch
from blocks import LAYERS, NETS, counted, draws, model_of, padded, upper_only
from nets import CLASSES, bert_config, conv, lora, multiple_choice, perceptron, tokens
from pairs import rank_guide
from torch import nn
from transformers import BertForSequenceClassification

import lrvd_pyro as lrvd
from lrvd_pyro.models import FactorLoRA, GateLoRA
from lrvd_pyro.predictive.fan_out import fanned_out, looped

close = torch.testing.assert_close
DEFAULT = pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")


@DEFAULT
@pytest.mark.parametrize("copies", [1, 2, 4, 6])
@pytest.mark.parametrize("build", NETS)
def test_it_equals_the_loop_over_draws(build: Any, copies: int) -> None:
    model, batch = model_of(build), padded()
    values = draws(model)
    with torch.no_grad():
        expected = looped(model, values, batch)
        got = fanned_out(model, values, batch, copies)
    close(got, expected)
    assert expected.std(0).min() > 1e-6
    assert got.shape == (7, 5, CLASSES)


@DEFAULT
@pytest.mark.parametrize("size", [1, 2, 7])  # as many as tokens, heads, one
@pytest.mark.parametrize("build", NETS)
def test_it_equals_the_loop_after_pruning_the_lower_blocks(
    build: Any, size: int
) -> None:
    model, batch = upper_only(model_of(build)), padded(size)
    values = draws(model)
    with torch.no_grad():
        close(fanned_out(model, values, batch, 3), looped(model, values, batch))


@DEFAULT
@pytest.mark.parametrize("build", NETS)
def test_predict_takes_it_without_a_warning(build: Any) -> None:
    model, batch = upper_only(model_of(build)), padded()
    guide = rank_guide(model, init_log_alpha=0.0)
    passes = counted(model.base_net.get_base_model())
    p = lrvd.predict(model, guide, [batch], 8, max_batch=20, return_samples=True)
    trial = 3 + 2 + 2  # plain, and two draws below one another, twice
    assert sum(passes.values()) == trial + 1 + 2  # seven draws, four at a time
    alone = lrvd.predict(model, guide, [batch], 8, max_batch=1, return_samples=True)
    close(p.samples, alone.samples)


@DEFAULT
@pytest.mark.parametrize("build", NETS)
def test_what_precedes_the_first_live_layer_runs_once_a_batch(build: Any) -> None:
    model, batch = upper_only(model_of(build)), padded()
    lists = [m for m in model.base_net.modules() if isinstance(m, nn.ModuleList)]
    blocks = [m for m in lists if len(m) == LAYERS][-1]
    inside = [next(m for m in b.modules() if not [*m.children()]) for b in blocks]
    passes = counted(*inside)
    with torch.no_grad():
        fanned_out(model, draws(model, 6), batch, 1)
    assert [passes[m] for m in inside] == [1, 1, 1, 6]


@pytest.mark.parametrize(
    ("net", "batch"),
    [
        (perceptron, lambda: {"x": torch.randn(4, 5)}),
        (conv, lambda: {"x": torch.randn(4, 3, 8, 8)}),
        (
            multiple_choice,
            lambda: {
                "input_ids": torch.randint(0, 50, (4, 3, 5)),
                "attention_mask": torch.ones(4, 3, 5, dtype=torch.long),
            },
        ),
    ],
)
def test_networks_of_other_kinds(net: Any, batch: Any) -> None:
    model, inputs = GateLoRA(net(), num_data=9), batch()
    values = draws(model)
    with torch.no_grad():
        close(fanned_out(model, values, inputs, 4), looped(model, values, inputs))


@pytest.mark.parametrize("kind", ["factor", "dora"])
def test_draws_for_a_whole_batch_share_the_prefix_and_no_pass(kind: str) -> None:
    net = lora(
        BertForSequenceClassification(bert_config()).double().eval(),
        target_modules=["value"],
        layers_to_transform=[1],
        use_dora=kind == "dora",
        task_type="SEQ_CLS",
    )
    model: Any = (FactorLoRA if kind == "factor" else GateLoRA)(net, num_data=60)
    guide = rank_guide(model, init_log_alpha=0.0)
    lower = net.base_model.model.bert.encoder.layer[0].attention
    passes, batch = counted(lower), tokens(labels=False)
    p = lrvd.predict(model, guide, [batch], 8, return_samples=True)
    assert passes[lower] == 3 + 1 + 1 + 1
    torch.manual_seed(0)
    drawn = [model.value_at(guide()) for _ in range(8)]
    with torch.no_grad():
        expected = looped(model, drawn, batch).softmax(-1)
    close(p.samples, expected)
