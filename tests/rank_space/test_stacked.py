"""Adapters around, on or beside others are refused when the model is made."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bases import bert, llama
from nets import hooks
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    XLoraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from torch import nn

from lrvd_pyro import RankSpace
from lrvd_pyro.models import FactorLoRA, GateLoRA

# PEFT's own, of what this file does on purpose.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Already (found|unmerged)"),
    pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged"),
]

Make = Callable[[Any], Any]


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**({"r": 4, "target_modules": ["query", "value"]} | options))


class Held(nn.Module):
    """A PEFT model as a part of one's own network."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.mine = get_peft_model(part, config()), nn.Linear(3, 3)


def twice(net: Any) -> Any:
    """A notebook cell that ran twice."""
    return get_peft_model(get_peft_model(net, config()), config())


def held(net: Any) -> Any:
    return get_peft_model(Held(net), config(target_modules=["mine"]))


def mixed(net: Any) -> Any:
    return get_peft_model(net, config(), mixed=True)


def beside(other: Any) -> Make:
    """Another kind of adapter, put into the network after LoRA."""

    def make(net: Any) -> Any:
        net = get_peft_model(net, config())
        inject_adapter_in_model(other, net.get_base_model(), "other")
        return net

    return make


def upon(net: Any) -> Any:
    """LoRA upon another kind of adapter."""
    below = get_peft_model(net, LoHaConfig(target_modules=["query"]))
    return get_peft_model(below.get_base_model(), config())


def both_active(net: Any) -> Any:
    net = get_peft_model(net, config())
    net.add_adapter("other", config())
    net.base_model.set_adapter(["default", "other"])
    return net


def merged_below(net: Any) -> Any:
    net = get_peft_model(net, config(target_modules=["key"]), "below")
    net.add_adapter("default", config())
    net.set_adapter("default")
    net.merge_adapter(["below"])
    return net


def sharing(side: str, *, whole: bool) -> Make:
    """Two modules with one weight, or one module, between them."""

    def make(net: Any) -> Any:
        net = get_peft_model(net, config())
        attention = net.base_model.model.bert.encoder.layer[0].attention.self
        one, other = getattr(attention.query, side), getattr(attention.value, side)
        if whole:
            other["default"] = one["default"]
        else:
            other["default"].weight = one["default"].weight
        return net

    return make


ONCE = r"holds a PeftModel at .*'.*ran twice; make the base once more"
OTHER = "adapter 'other' is of type {}, and no file.*get_peft_model.net.merge_and"
SHARED = "'.*query' and '.*value' share a LoRA weight.*each module its own lora_A"
REFUSED: dict[str, tuple[Make, type[Exception], str]] = {
    "get_peft_model twice": (twice, TypeError, ONCE),
    "a PEFT model held": (held, TypeError, ONCE),
    "mixed": (mixed, TypeError, "PeftMixedModel.*without mixed=True"),
    "IA3 beside": (
        beside(IA3Config(target_modules=["query"], feedforward_modules=[])),
        TypeError,
        OTHER.format("IA3"),
    ),
    "LoHa beside": (
        beside(LoHaConfig(target_modules=["key"])),
        TypeError,
        OTHER.format("LOHA"),
    ),
    "upon LoHa": (
        upon,
        TypeError,
        "query.base_layer' is a peft.tuners.loha.layer.Lin.*merge_and",
    ),
    "two active": (
        both_active,
        ValueError,
        r"\['default', 'other'\] are active at once.*call net.set_adapter\('default'\)",
    ),
    "another merged": (
        merged_below,
        ValueError,
        r"\['below'\] are merged into the base.*call net.unmerge_adapter\(\)",
    ),
    "lora_A shared": (sharing("lora_A", whole=False), ValueError, SHARED),
    "lora_A one module": (sharing("lora_A", whole=True), ValueError, SHARED),
    "lora_B shared": (sharing("lora_B", whole=False), ValueError, SHARED),
    "lora_B one module": (sharing("lora_B", whole=True), ValueError, SHARED),
}


@pytest.mark.parametrize("kind", [GateLoRA, FactorLoRA])
@pytest.mark.parametrize("situation", REFUSED)
def test_what_could_not_be_written_is_refused_when_the_model_is_made(
    situation: str, kind: Any
) -> None:
    make, error, message = REFUSED[situation]
    net = make(bert())
    with pytest.raises(error, match=message):
        kind(net, adapter="default", num_data=60)
    assert hooks(net) == 0


def test_a_mixture_of_loras_is_refused(tmp_path: Path) -> None:
    expert = config(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(llama(), expert).save_pretrained(tmp_path)
    net = llama()
    net.config.use_cache = False
    mixture = XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, adapters={"a": str(tmp_path)}
    )
    with pytest.raises(TypeError, match="'default' is of type XLORA.*leave it out"):
        RankSpace(get_peft_model(net, mixture), "0")


@pytest.mark.parametrize("way_out", ["unmerge", "base"])
def test_the_ways_out_of_a_merged_adapter_work(way_out: str) -> None:
    net = merged_below(bert())
    if way_out == "unmerge":
        net.unmerge_adapter()
    else:
        base = net.merge_and_unload(adapter_names=["below"])
        net = get_peft_model(base, config())
    GateLoRA(net, num_data=60)
