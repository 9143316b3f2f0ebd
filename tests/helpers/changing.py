"""Networks whose passes change what they are given, and batches for them."""

import copy
from collections.abc import Callable
from typing import Any

import nets
import torch
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    StaticCache,
)

SIZE = 4


class Counter:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.calls, self.seen = 0, torch.ones(2, requires_grad=True) * 2


class Changing(nets.Perceptron):
    """Changes what it is given, and predicts by what it was."""

    def forward(self, x: Tensor, state: Any = None) -> Tensor:  # type: ignore[override]
        if isinstance(state, list):
            scale = float(state.pop())
        elif isinstance(state, dict):
            scale, state["deep"]["scale"] = state["deep"]["scale"], 100.0
        elif isinstance(state, Counter):
            state.calls += 1
            scale = 1.0 / state.calls + float(state.seen.detach().sum())
            state.seen = state.seen + 1
        else:
            scale = 1.0
        x.mul_(0.5)
        return super().forward(x) * scale


def changing() -> nn.Module:
    return nets.lora(Changing(), target_modules=["hidden", "out"])


STATES: dict[str, Callable[[], Any]] = {
    "tensor": lambda: None,
    "list": lambda: [9.0, 3.0],
    "dict": lambda: {"deep": {"scale": 3.0}},
    "object": Counter,
}


def llama(layers: int = 2) -> Any:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        num_labels=3,
        pad_token_id=1,
    )
    return LlamaForSequenceClassification(config).double().eval()


def gpt2() -> Any:
    config = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=50, num_labels=3, pad_token_id=1
    )
    return GPT2ForSequenceClassification(config).double().eval()


def cached(base: Any, kind: Any, with_graph: bool = False) -> dict[str, Any]:
    """A batch whose first four tokens are in a key-value cache already."""
    ids = torch.randint(3, 50, (SIZE, 7))
    length = {} if kind is DynamicCache else {"max_cache_len": 9}
    cache = kind(config=base.config, **length)
    with torch.set_grad_enabled(with_graph):
        base.get_decoder()(input_ids=ids[:, :4], past_key_values=cache)
    mask = torch.ones(SIZE, 7, dtype=torch.long)
    return {"input_ids": ids[:, 4:], "attention_mask": mask, "past_key_values": cache}


CASES: dict[str, tuple[str, Any]] = {
    "llama-dynamic": ("llama", DynamicCache),
    "llama-static": ("llama", StaticCache),
    "gpt2-dynamic": ("gpt2", DynamicCache),
    **{name: ("changing", make) for name, make in STATES.items()},
}


def made(case: str) -> tuple[Any, dict[str, Any]]:
    """A network with LoRA, and a batch of which a pass changes something."""
    kind, make = CASES[case]
    if kind == "changing":
        return changing(), {"x": torch.randn(SIZE, 5), "state": make()}
    base = llama() if kind == "llama" else gpt2()
    batch = cached(base, make)
    if kind == "llama":
        return nets.lora(base, target_modules=["o_proj", "down_proj"]), batch
    options: Any = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    return nets.lora(base, **options), batch


def bits(value: Any) -> Any:
    """The numbers in nested containers and objects, to compare them."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [bits(each) for each in value]
    if type(value).__module__.startswith(("transformers", __name__)):
        return bits(vars(value))
    return repr(value)


def by_hand(model: Any, value: Tensor, batch: dict[str, Any]) -> Tensor:
    """The logits of one pass under a draw, on inputs made for it alone."""
    with torch.no_grad(), model.bind(value):
        inputs = {name: duplicate(each) for name, each in batch.items()}
        output = model.base_net.eval()(**inputs)
    logits: Tensor = getattr(output, "logits", output)
    return logits


def duplicate(each: Any) -> Any:
    """A copy that owes nothing to the library: tensors lose their graph first."""
    if isinstance(each, Tensor):
        return each.detach().clone()
    if type(each).__module__.startswith("transformers"):
        twin = copy.copy(each)
        twin.layers = [copy.copy(layer) for layer in each.layers]
        for layer in twin.layers:
            for name, tensor in vars(layer).items():
                if isinstance(tensor, Tensor):
                    vars(layer)[name] = tensor.detach().clone()
        return twin
    if isinstance(each, Counter):
        twin = Counter()
        twin.calls, twin.seen = each.calls, each.seen.detach().clone()
        return twin
    return copy.deepcopy(each)
