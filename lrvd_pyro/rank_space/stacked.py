"""Refuse adapters that stand around, on or beside each other, with a way out.

Such a network trains. Its files would lack a part of what was trained, or PEFT could
not read them.
"""

from collections.abc import Mapping
from typing import Any

from peft import PeftMixedModel, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper
from torch import Tensor, nn

__all__ = ["refuse_nested", "refuse_stacked"]

_ONCE = (
    "make the base once more, from_pretrained(...), and give it to "
    "get_peft_model(net, LoraConfig(...)) once"
)
_BELOW = (
    "merge it into the base before LoRA is added, "
    "get_peft_model(net.merge_and_unload(), LoraConfig(...)), or leave it out"
)


def refuse_nested(net: nn.Module) -> None:
    """Raise a TypeError if a network is a mixed PEFT model, or holds another one."""
    if isinstance(net, PeftMixedModel):
        raise TypeError(
            "net is a PeftMixedModel, for which PEFT has no files; call "
            "get_peft_model(net, LoraConfig(...)) without mixed=True"
        )
    for name, module in net.named_modules():
        if isinstance(module, PeftModel | PeftMixedModel) and module is not net:
            raise TypeError(
                f"net is a {type(net).__name__} that holds a {type(module).__name__} "
                f"at {name!r}, as after get_peft_model(net, ...) of a PEFT model, a "
                f"notebook cell that ran twice; {_ONCE}"
            )


def refuse_stacked(
    net: nn.Module, adapter: str, layers: Mapping[str, LoraLayer]
) -> None:
    """Raise if other adapters work beside one, or two of its modules share weights.

    Args:
        net: A PEFT model, or a network with an adapter of its own.
        adapter: The adapter's name.
        layers: Its LoRA layers by name.

    Raises:
        TypeError: If an adapter of another kind is in the network.
        ValueError: If another LoRA adapter is active too, or merged, or weights are
            shared.
    """
    _refuse_other_kinds(net)
    _refuse_other_loras(net, adapter)
    _refuse_shared(adapter, layers)


def _refuse_other_kinds(net: nn.Module) -> None:
    configs: Any = net.peft_config
    for name, config in configs.items():
        if config.peft_type != PeftType.LORA:
            raise TypeError(
                f"adapter {name!r} is of type {config.peft_type.value}, and no file of "
                f"LoRA holds it; {_BELOW}"
            )
    # LoraConfig(trainable_token_indices=...) makes these: part of a LoRA adapter.
    wrappers = (m for m in net.modules() if isinstance(m, TrainableTokensWrapper))
    tokens = {wrapper.token_adapter for wrapper in wrappers}
    for name, module in net.named_modules():
        known = isinstance(module, LoraLayer) or module in tokens
        if isinstance(module, BaseTunerLayer) and not known:
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise TypeError(
                f"{name!r} is a {kind}, an adapter that is not LoRA, and no file of "
                f"LoRA holds it; {_BELOW}"
            )


def _refuse_other_loras(net: nn.Module, adapter: str) -> None:
    active, merged = set[str](), set[str]()
    for module in net.modules():
        if isinstance(module, LoraLayer):
            active |= set(module.active_adapters) & module.r.keys()
            merged |= set(module.merged_adapters) - {adapter}
    # While it is not active itself, it may be made so later, alone.
    if adapter in active and len(active) > 1:
        raise ValueError(
            f"adapters {sorted(active)} are active at once, and the files of "
            f"{adapter!r} hold it alone; call net.set_adapter({adapter!r}), or merge "
            f"the others into the base before this one is added"
        )
    if merged:
        raise ValueError(
            f"adapters {sorted(merged)} are merged into the base, and the files of "
            f"{adapter!r} do not hold them; call net.unmerge_adapter(), or add this "
            f"one to the base net.merge_and_unload(adapter_names={sorted(merged)})"
        )


def _refuse_shared(adapter: str, layers: Mapping[str, LoraLayer]) -> None:
    owners: dict[Tensor, str] = {}
    for name, layer in layers.items():
        sides: Any = layer.lora_A[adapter], layer.lora_B[adapter]
        for weight in (side.weight for side in sides):
            if owners.setdefault(weight, name) != name:
                raise ValueError(
                    f"{owners[weight]!r} and {name!r} share a LoRA weight, and its "
                    f"rank components cannot be removed in one of them alone; give "
                    f"each module its own lora_A and lora_B, as get_peft_model does"
                )
