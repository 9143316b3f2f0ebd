"""What the first training step tells of: random parts that stay, dropout that is on."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import bert, perceptron, tokens
from pairs import rank_guide
from peft import LoraConfig, get_peft_model
from pyro.infer import SVI
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)
from transformers.utils import logging

import lrvd_pyro as lrvd
from lrvd_pyro.inference.dropout import active_dropout
from lrvd_pyro.models import GateLoRA

SIZE: dict[str, Any] = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
)
ROW = "ignore:`is_gradient_checkpointing`:FutureWarning"


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    """A checkpoint without a head."""
    logging.set_verbosity_error()
    config = BertConfig(vocab_size=100, hidden_dropout_prob=0.0, **SIZE)
    config.attention_probs_dropout_prob, config.num_labels = 0.0, 3
    BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def told(net: Any, **batch: Any) -> list[str]:
    """What two training steps say."""
    model = GateLoRA(net, num_data=60)
    return told_by(model, rank_guide(model), **(batch or tokens()))


def told_by(model: Any, guide: Any, **batch: Any) -> list[str]:
    svi = SVI(model, guide, lrvd.optim.AdamW(), loss=lrvd.RankELBO())
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(2):
            svi.step(**batch)
    return [str(w.message) for w in heard if w.category is UserWarning]


def adapted(base: Any, **options: Any) -> Any:
    targets = ["query"] if hasattr(base, "bert") else ["q_proj"]
    return get_peft_model(base, LoraConfig(target_modules=targets, **options))


@pytest.mark.filterwarnings(ROW)
def test_a_new_head_that_stays_random_is_told_of_once(bert_folder: Path) -> None:
    net = adapted(BertForSequenceClassification.from_pretrained(bert_folder))
    before = net.base_model.model.classifier.weight.clone()
    (message,) = told(net)
    assert message == (
        "the checkpoint had no classifier.weight, classifier.bias: 2 parameters are "
        'random and frozen, and training leaves them so; LoraConfig(task_type="SEQ_CLS"'
        '), or "TOKEN_CLS", trains a new head, and '
        "LoraConfig(modules_to_save=['classifier']) any part"
    )
    assert torch.equal(net.base_model.model.classifier.weight, before)


@pytest.mark.filterwarnings(ROW)
@pytest.mark.parametrize(
    "options", [{"task_type": "SEQ_CLS"}, {"modules_to_save": ["classifier"]}]
)
def test_a_head_that_trains_is_not_told_of(
    bert_folder: Path, options: dict[str, Any]
) -> None:
    base = BertForSequenceClassification.from_pretrained(bert_folder)
    assert told(adapted(base, **options)) == []


@pytest.mark.filterwarnings(ROW)
def test_a_head_that_has_an_adapter_is_not_told_of(bert_folder: Path) -> None:
    base = BertForSequenceClassification.from_pretrained(bert_folder)
    config = LoraConfig(target_modules=["query", "classifier"])
    assert told(get_peft_model(base, config)) == []


@pytest.mark.filterwarnings(ROW)
def test_a_head_of_the_checkpoint_may_stay_frozen(
    bert_folder: Path, tmp_path: Path
) -> None:
    whole = BertForSequenceClassification.from_pretrained(bert_folder)
    whole.save_pretrained(tmp_path / "whole")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "whole")
    assert told(adapted(again)) == []


@pytest.mark.filterwarnings(ROW)
@pytest.mark.parametrize("tied", [True, False])
def test_a_language_models_head_is_not_told_of_and_a_classifiers_is(
    tmp_path: Path, tied: bool
) -> None:
    logging.set_verbosity_error()
    config = LlamaConfig(vocab_size=100, tie_word_embeddings=tied, **SIZE)
    config.pad_token_id = 0
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    net = adapted(LlamaForCausalLM.from_pretrained(tmp_path), task_type="CAUSAL_LM")

    class LastToken(lrvd.likelihoods.Categorical):
        def __call__(self, predictions: Any, labels: Any, num_data: int) -> None:
            super().__call__(predictions[:, -1], labels, num_data)

    model = GateLoRA(net, num_data=60, likelihood=LastToken())
    assert told_by(model, rank_guide(model), **tokens()) == []
    base = LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    (message,) = told(adapted(base))
    assert message.startswith("the checkpoint had no score.weight: 1 parameters")


def test_a_network_without_a_checkpoint_is_random_all_over_and_not_told_of() -> None:
    """Warnings are errors here, and this head is frozen."""
    net = bert()
    net.base_model.model.requires_grad_(False)
    assert told(net) == []


def with_dropout(rate: float) -> Any:
    net = perceptron()
    net.base_model.model.out.register_forward_pre_hook(Noise(rate))
    net.base_model.model.dropout = nn.Dropout(rate)
    return net


class Noise:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(self, module: nn.Module, args: Any) -> Any:
        return nn.functional.dropout(args[0], self.rate, module.training)


def rows() -> dict[str, Any]:
    return {"x": torch.randn(6, 5), "labels": torch.randint(0, 3, (6,))}


def test_dropout_that_is_on_is_told_of_once_whenever_it_comes_on() -> None:
    net = with_dropout(0.1)
    model = GateLoRA(net.eval(), num_data=60)
    guide = rank_guide(model)
    assert told_by(model, guide, **rows()) == []
    net.train()
    (message,) = told_by(model, guide, **rows())
    assert message.startswith(
        "the network trains with dropout: 0.1 in 'dropout', 1 such"
    )
    assert "call net.eval()" in message
    assert told_by(model, guide, **rows()) == []


def test_dropout_of_rate_0_is_not_told_of() -> None:
    assert told(with_dropout(0.0).train(), **rows()) == []


def test_lora_dropout_is_told_of_by_its_own_warning_alone() -> None:
    with pytest.warns(UserWarning, match="is a second source of noise") as caught:
        net = perceptron(lora_dropout=0.2).train()
        model = GateLoRA(net, num_data=60)
    assert len(caught) == 1
    assert told_by(model, rank_guide(model), **rows()) == []


class Functional(nn.Module):
    """As many of Transformers' layers: a rate, and torch's function."""

    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, 0.3)


@pytest.mark.parametrize("name", ["attention_dropout", "drop_prob", "layerdrop"])
def test_a_rate_without_a_module_counts_as_dropout(name: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), Functional(name), nn.Dropout(0.0))
    assert active_dropout(net) == {"1": 0.3}
    assert active_dropout(net.eval()) == {}


@pytest.mark.parametrize("start", ["olora", "pissa"])
def test_an_adapter_taken_out_of_the_base_is_told_of_before_it_trains(
    start: str,
) -> None:
    torch.set_default_dtype(torch.float32)
    model = GateLoRA(bert(init_lora_weights=start, r=2), num_data=6)
    with pytest.warns(UserWarning, match=f"init_lora_weights='{start}' changed the ba"):
        model(**tokens())
    model(**tokens())  # once: another warning would be an error


@pytest.mark.parametrize("bias", ["none", "all"])
def test_parts_of_the_base_that_train_are_told_of_unless_files_hold_them(
    bias: Any,
) -> None:
    net = bert(bias=bias)
    for name, parameter in net.named_parameters():
        if "LayerNorm.weight" in name and bias == "none":
            parameter.requires_grad_(True)
    model = GateLoRA(net, num_data=6)
    if bias == "all":
        model(**tokens())  # a warning would be an error
        return
    with pytest.warns(
        UserWarning, match=r"LayerNorm.weight.* \(5 parameters\) of the b"
    ):
        model(**tokens())
