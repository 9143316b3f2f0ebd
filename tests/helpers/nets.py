"""Small real networks and batches, and what the tests do to a RankSpace."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from lrvd_pyro import RankSpace

CLASSES = 3
# PEFT's own, whenever it meets such a layer
GROUPED = "ignore:LoRA adapter added to ConvNd layer with groups:UserWarning"
RAGGED = {"rank_pattern": {"hidden": 2}, "alpha_pattern": {"hidden": 3}}


def lora(net: nn.Module, *, randomize: bool = True, **config: Any) -> PeftModel:
    """Inject LoRA; ``randomize`` makes B differ from zero."""
    options: dict[str, Any] = {"r": 4, "lora_alpha": 8} | config
    peft = get_peft_model(net, LoraConfig(**options))
    if randomize:
        for name, p in peft.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(p, std=0.3)
    return peft


def bert_config(layers: int = 2) -> BertConfig:
    """Layers of width 16, no dropout."""
    return BertConfig(
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        vocab_size=50,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def bert(*, randomize: bool = True, layers: int = 2, **config: Any) -> PeftModel:
    """A two-layer BERT classifier of width 16 without dropout, rank 4 on q and v."""
    options: dict[str, Any] = {
        "target_modules": ["query", "value"],
        "task_type": "SEQ_CLS",
    } | config
    net = BertForSequenceClassification(bert_config(layers))
    return lora(net.to(torch.get_default_dtype()), randomize=randomize, **options)


def multiple_choice() -> PeftModel:
    """A BERT that sees each example as several rows, one for each choice."""
    net = BertForMultipleChoice(bert_config())
    targets = ["query", "value", "pooler.dense"]
    return lora(net.to(torch.get_default_dtype()), target_modules=targets)


def gpt2(**config: Any) -> PeftModel:
    """A two-layer GPT-2, whose layers are Transformers' Conv1D."""
    sizes = GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        vocab_size=50,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    net = GPT2LMHeadModel(sizes).to(torch.get_default_dtype())
    targets = ["c_attn", "c_fc"]
    return lora(net, target_modules=targets, fan_in_fan_out=True, **config)


class Convolutions(nn.Module):
    """Images to logits by two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).mean((-2, -1))


def conv(**config: Any) -> PeftModel:
    """LoRA on both convolutions."""
    return lora(Convolutions(), target_modules=["first", "second"], **config)


class Grouped(nn.Module):
    """A grouped convolution, and a plain one of its own rank."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 6, 3, groups=2)
        self.second = nn.Conv2d(6, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).mean((-2, -1))


def grouped(**config: Any) -> PeftModel:
    """LoRA on both convolutions, of which PEFT warns: see GROUPED."""
    return lora(Grouped(), target_modules=["first", "second"], **config)


class Perceptron(nn.Module):
    """Two linear layers."""

    def __init__(self, features: int = 5, hidden: int = 6, outputs: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.out = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hidden(x).tanh())


def perceptron(**config: Any) -> PeftModel:
    """LoRA of rank 4 on both layers."""
    return lora(Perceptron(), target_modules=["hidden", "out"], **config)


def tokens(size: int = 6, *, labels: bool = True, length: int = 5) -> dict[str, Tensor]:
    """A batch as a tokenizer gives it."""
    batch = {
        "input_ids": torch.randint(0, 50, (size, length)),
        "attention_mask": torch.ones(size, length, dtype=torch.long),
    }
    return batch | ({"labels": torch.randint(0, CLASSES, (size,))} if labels else {})


class Regression(nn.Module):
    """One linear layer; with LoRA on it, predictions are linear in the gates."""

    def __init__(self, features: int, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(features, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def regression(features: int = 5, r: int = 3, outputs: int = 1) -> PeftModel:
    """LoRA of rank r on `Regression`, B not zero."""
    return lora(
        Regression(features, outputs), r=r, lora_alpha=r, target_modules=["linear"]
    )


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


def components(space: RankSpace, side: str) -> list[Tensor]:
    """What each rank component owns of a side's weights, as views of them."""
    slots = []
    for weight, rank in zip(space.weights(side), space.ranks):
        if side == "lora_A":
            slots += [weight.data[i] for i in range(rank)]
            continue
        groups = rank // weight.shape[1]  # of a grouped convolution
        for group in weight.data.chunk(groups):
            slots += [group[:, i] for i in range(rank // groups)]
    return slots


@contextmanager
def replaced(space: RankSpace, value: Tensor) -> Iterator[None]:
    """The network's own weights replaced by ``value``, laid out as by flatten."""
    weights = [w for side in space.sides for w in space.weights(side)]
    places = [slot for side in space.sides for slot in components(space, side)]
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        pieces = value.split([slot.numel() for slot in places])
        for slot, piece in zip(places, pieces, strict=True):
            slot.copy_(piece.view(slot.shape))
    yield
    with torch.no_grad():
        for w, old in zip(weights, before):
            w.copy_(old)


def flat(space: RankSpace) -> Tensor:
    """The network's own weights, laid out as drawn ones."""
    return torch.cat([space.flatten(side) for side in space.sides]).detach()


def hooks(net: nn.Module) -> int:
    """How many forward hooks there are in the network."""
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in net.modules())


def refused(space: RankSpace, message: str) -> None:
    """Binding a gate raises an error with this message."""
    with pytest.raises(RuntimeError, match=message):
        with space.bind(torch.ones(space.size)):
            pytest.fail("entered")


def rows(size: int = 6) -> dict[str, Tensor]:
    """A batch for `perceptron`."""
    return {"x": torch.randn(size, 5), "labels": torch.arange(size) % 3}


class TwoExperts(nn.Module):
    """Only batches with a positive sum go to the second expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(5, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts[0](x)
        return y + self.experts[1](x) if x.sum() > 0 else y
