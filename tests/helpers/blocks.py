"""Small encoders and decoders of four blocks, with LoRA in every one."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from nets import CLASSES, lora
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
)

from lrvd_pyro.guides import RankDiagonal
from lrvd_pyro.models import GateLoRA
from lrvd_pyro.selection.removal import select

Batch = dict[str, Any]
LAYERS, PAD = 4, 1
SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 50,
    "num_labels": CLASSES,
    "pad_token_id": PAD,
    "max_position_embeddings": 40,
}


def encoder() -> tuple[nn.Module, str]:
    return BertForSequenceClassification(BertConfig(**SIZES)), "value"


def roberta() -> tuple[nn.Module, str]:
    return RobertaForSequenceClassification(RobertaConfig(**SIZES)), "value"


def distilbert() -> tuple[nn.Module, str]:
    sizes = {"dim": 16, "n_layers": LAYERS, "n_heads": 2, "hidden_dim": 32}
    config = DistilBertConfig(**sizes, vocab_size=50, num_labels=CLASSES)
    return DistilBertForSequenceClassification(config), "v_lin"


def gpt2() -> tuple[nn.Module, str]:
    config = GPT2Config(
        n_embd=16,
        n_layer=LAYERS,
        n_head=2,
        n_positions=40,
        vocab_size=50,
        num_labels=CLASSES,
        pad_token_id=PAD,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2ForSequenceClassification(config), "c_proj"


def llama() -> tuple[nn.Module, str]:
    config = LlamaConfig(**SIZES, num_key_value_heads=1)
    return LlamaForSequenceClassification(config), "v_proj"


def t5() -> tuple[nn.Module, str]:
    config = T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=LAYERS,
        num_heads=2,
        vocab_size=50,
        num_labels=CLASSES,
        pad_token_id=PAD,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return T5ForSequenceClassification(config), r".*decoder.*\.v"


NETS = [encoder, roberta, distilbert, gpt2, llama, t5]


def model_of(build: Callable[[], tuple[nn.Module, str]], **config: Any) -> GateLoRA:
    net, target = build()
    targets = target if "*" in target else [target]
    conv1d = {"fan_in_fan_out": True} if build is gpt2 else {}
    options = {"target_modules": targets, "task_type": "SEQ_CLS"} | conv1d | config
    peft = lora(net.to(torch.get_default_dtype()).eval(), **options)
    return GateLoRA(peft, num_data=60)


def padded(size: int = 5, length: int = 7) -> Batch:
    """Texts of different lengths, ending in token 2."""
    ids = torch.randint(3, 50, (size, length))
    lengths = 2 + torch.arange(size) % (length - 1)
    ids[torch.arange(size), lengths - 1] = 2
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def draws(model: GateLoRA, count: int = 7) -> Tensor:
    return 1 + 0.7 * torch.randn(count, model.space.size)


def upper_only(model: GateLoRA) -> GateLoRA:
    """Prune every LoRA layer but those of the last block."""
    blocks = torch.tensor(model.space.coordinates["layer"])
    select(model, RankDiagonal(model), keep=blocks == blocks.max())
    return model


def counted(*modules: nn.Module) -> Counter[nn.Module]:
    """How often each module's forward runs from now on."""
    passes: Counter[nn.Module] = Counter()
    for module in modules:
        module.register_forward_pre_hook(lambda m, args: passes.update([m]))
    return passes
