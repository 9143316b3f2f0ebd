"""Networks whose LoRA layers see other rows than those of the examples, in order."""

from collections.abc import Callable
from typing import Any

import torch
from nets import bert_config, lora
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BertForSequenceClassification,
    DebertaConfig,
    DebertaForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LongformerConfig,
    LongformerForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

EXAMPLES, LENGTH = 4, 8
Batch = dict[str, Tensor]
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.3,
    "num_labels": 2,
}


def _adapted(net: nn.Module, targets: list[str], **config: Any) -> PeftModel:
    net = net.to(torch.get_default_dtype()).eval()
    return lora(net, target_modules=targets, **config)


def longformer(**config: Any) -> PeftModel:
    """Sequence x batch x width in query, key and value."""
    sizes = LongformerConfig(**SIZES, attention_window=4, pad_token_id=0)
    return _adapted(
        LongformerForSequenceClassification(sizes), ["query", "value"], **config
    )


def xlnet(**config: Any) -> PeftModel:
    """Sequence x batch x width in the feed-forward layers."""
    sizes = XLNetConfig(
        vocab_size=50,
        d_model=16,
        n_layer=2,
        n_head=2,
        d_inner=32,
        dropout=0.0,
        summary_last_dropout=0.0,
        initializer_range=0.3,
    )
    targets = ["layer_1", "layer_2"]
    return _adapted(XLNetForSequenceClassification(sizes), targets, **config)


def deberta_v1(**config: Any) -> PeftModel:
    """Position embeddings of one row pass through layers of their own."""
    options = {"relative_attention": True, "max_relative_positions": 4}
    sizes = DebertaConfig(**SIZES, **options, pos_att_type=["c2p", "p2c"])
    targets = ["in_proj", "pos_proj", "pos_q_proj"]
    return _adapted(DebertaForSequenceClassification(sizes), targets, **config)


def deberta(*, share_att_key: bool = True, **config: Any) -> PeftModel:
    """Position embeddings of one row pass through the key and query layers.

    So it is with ``share_att_key``, as in DeBERTa-v3. Without it, they have layers of
    their own.
    """
    sizes = DebertaV2Config(
        **SIZES,
        relative_attention=True,
        position_buckets=4,
        share_att_key=share_att_key,
        pos_att_type=["p2c", "c2p"],
        norm_rel_ebd="layer_norm",
        type_vocab_size=0,
    )
    targets = ["query_proj", "value_proj"]
    if not share_att_key:
        targets += ["pos_key_proj", "pos_query_proj"]
    return _adapted(DebertaV2ForSequenceClassification(sizes), targets, **config)


def deberta_apart(**config: Any) -> PeftModel:
    """DeBERTa-v2 without ``share_att_key``."""
    return deberta(share_att_key=False, **config)


class Encoder(nn.Module):
    """Torch's own encoder, with the sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        h: Tensor = self.encoder(self.embed(input_ids).transpose(0, 1))
        logits: Tensor = self.head(h.mean(0))
        return logits


def encoder(**config: Any) -> PeftModel:
    """LoRA on the feed-forward layers."""
    return _adapted(Encoder(), ["linear1", "linear2"], **config)


class FirstToken(nn.Module):
    """A layer with the sequence first, of which the first token is read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layer = nn.Linear(16, 2)

    def forward(self, input_ids: Tensor) -> Tensor:
        h: Tensor = self.layer(self.embed(input_ids[:, :EXAMPLES]).transpose(0, 1))
        return h[0]


def first_token(**config: Any) -> PeftModel:
    """All examples see the gates of the first, which alone sees its own."""
    return _adapted(FirstToken(), ["layer"], **config)


class Pairs(nn.Module):
    """A reward model that runs chosen and rejected texts as one batch of 2 B rows."""

    def __init__(self) -> None:
        super().__init__()
        config = bert_config()
        config.update({"num_labels": 1, "initializer_range": 0.3})
        self.net = BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        chosen, rejected = input_ids, input_ids.flip(1)
        logits: Tensor = self.net(input_ids=torch.cat([chosen, rejected])).logits
        return torch.cat(logits.chunk(2), 1)


def pairs(**config: Any) -> PeftModel:
    """LoRA on query and value."""
    return _adapted(Pairs(), ["query", "value"], **config)


class Towers(nn.Module):
    """Texts against prompts; the prompts have a tower and rows of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.texts, self.prompts = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor) -> Tensor:
        texts = self.texts(self.embed(input_ids).mean(1))
        # as many prompts as there are examples: each would get the gates of one
        numbers = torch.arange(EXAMPLES, device=input_ids.device)
        prompts: Tensor = self.prompts(self.embed(numbers)).tanh()
        return texts @ prompts.T


def towers(**config: Any) -> PeftModel:
    """LoRA on both towers."""
    return _adapted(Towers(), ["texts", "prompts"], **config)


class Unbatched(nn.Module):
    """A convolution that sees one image at a time, without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, input_ids: Tensor) -> Tensor:
        images = input_ids.unflatten(1, (1, 2, 4)).to(self.conv.weight) / 50
        return torch.stack([self.conv(image).tanh().mean((1, 2)) for image in images])


def unbatched(**config: Any) -> PeftModel:
    """LoRA of rank 4 for 4 examples: its channels were taken for rows."""
    return _adapted(Unbatched(), ["conv"], **config)


# By network: the first LoRA layer that sees foreign rows.
Make = Callable[..., PeftModel]
MIXED: dict[Make, str] = {
    longformer: "longformer.encoder.layer.0.attention.self.query",
    xlnet: "transformer.layer.0.ff.layer_1",
    deberta: "deberta.encoder.layer.0.attention.self.query_proj",
    deberta_apart: "deberta.encoder.layer.0.attention.self.pos_key_proj",
    deberta_v1: "deberta.encoder.layer.0.attention.self.pos_proj",
    encoder: "encoder.layers.0.linear1",
    first_token: "layer",
    pairs: "net.bert.encoder.layer.0.attention.self.query",
    towers: "prompts",
    unbatched: "conv",
}


def texts(size: int = EXAMPLES) -> Batch:
    """Token ids and labels."""
    ids = torch.randint(4, 50, (size, LENGTH))
    return {"input_ids": ids, "labels": torch.arange(size) % 2}


def single(batch: Batch, index: int) -> Batch:
    """One example as a batch."""
    return {name: value[index : index + 1] for name, value in batch.items()}


class TimeFirst(nn.Module):
    """Its layer has the sequence first; some choices are absent."""

    def __init__(self, absent: float) -> None:
        super().__init__()
        self.layer, self.absent = nn.Linear(5, 3), absent

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layer(x.transpose(0, 1)).mean(0)
        return logits + torch.tensor([0.0, 0.0, self.absent])


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
