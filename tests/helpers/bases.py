"""Small Transformers networks without PEFT."""

from typing import Any

from nets import bert_config
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)


def bert() -> Any:
    return BertForSequenceClassification(bert_config())


def gpt2(*, tied: bool = True) -> Any:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=50)
    config.update({"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0})
    config.update({"bos_token_id": 0, "eos_token_id": 0})
    config.tie_word_embeddings = tied
    return GPT2LMHeadModel(config)


def llama() -> Any:
    config = LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
    config.update({"intermediate_size": 32, "vocab_size": 50, "bos_token_id": 0})
    config.update({"eos_token_id": 0, "tie_word_embeddings": True})
    return LlamaForCausalLM(config)
