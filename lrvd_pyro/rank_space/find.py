"""Find the LoRA layers that a draw can enter; refuse the others with a way out."""

import warnings
from collections.abc import Iterable
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from lrvd_pyro._compat.torch import compiled_original, convolves, is_compiled
from lrvd_pyro.rank_space.constant import is_constant
from lrvd_pyro.rank_space.stacked import refuse_nested, refuse_stacked

__all__ = ["PREFIX", "active_adapters", "find_layers", "pick_adapter", "plain_net"]

PREFIX = "base_model.model."  # before the names of a PeftModel's modules

# An allow-list, since a hook fails in silence elsewhere: PEFT's MultiheadAttention and
# ParamWrapper layers have a module lora_B and never call it. To admit another kind,
# show in tests/rank_space/test_gates.py that its gate equals the gate folded into B.
_GATED = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Linear8bitLt", "Linear4bit"}
_VARIANTS = {"DoraLinearVariant"}


def plain_net(net: nn.Module) -> Any:
    """The user's own network, which a PeftModel wraps, or which ``add_adapter`` filled.

    Its LoRA layers stay inside.
    """
    return net.get_base_model() if isinstance(net, PeftModel) else net


def active_adapters(net: nn.Module) -> list[str]:
    """The names of the active adapters, as the first LoRA layer of a network has them.

    A PeftModel has a property of this name, and Transformers' networks a method.
    """
    if isinstance(net, PeftModel):
        return list(net.active_adapters)
    layers = (m for m in net.modules() if isinstance(m, LoraLayer))
    return list(next(layers).active_adapters)


def _has_lora(net: object) -> bool:
    """Whether PEFT put LoRA layers into a network, as a PeftModel or without one."""
    if not isinstance(net, nn.Module) or not hasattr(net, "peft_config"):
        return False
    return isinstance(net, PeftModel) or any(
        isinstance(module, LoraLayer) for module in net.modules()
    )


def pick_adapter(net: nn.Module, adapter: str | None) -> str:
    """The name of an adapter that exists: the given one, or the single active one.

    Args:
        net: A PEFT model, or a network with an adapter of its own.
        adapter: The adapter's name; None takes the single active one.

    Raises:
        TypeError: If ``net`` has no LoRA layers, or one PEFT model is in another.
        ValueError: If the adapter is unknown, or if not exactly one is active.
    """
    if not _has_lora(net):
        config = "LoraConfig(r=8, ...)"
        way = f"get_peft_model(net, {config}), or net.add_adapter({config})"
        if _has_lora(compiled_original(net)):
            way = "make the model first, then net.compile()"
        raise TypeError(
            f"net is a {type(net).__name__}; expected a PEFT model, or a network with "
            f"LoRA layers: {way}"
        )
    refuse_nested(net)
    known: Any = net.peft_config
    if adapter is None:
        active = active_adapters(net)
        if len(active) != 1:
            raise ValueError(
                f"adapters {active} are active; expected one of {list(known)}: "
                f"net.set_adapter(name)"
            )
        return active[0]
    if adapter not in known:
        raise ValueError(
            f"adapter {adapter!r} is unknown; the network has {list(known)}"
        )
    return adapter


def find_layers(net: nn.Module, adapter: str, *, weights: bool) -> dict[str, LoraLayer]:
    """The LoRA layers of an adapter by their names in the network without PEFT.

    Args:
        net: A PEFT model, or a network with an adapter of its own.
        adapter: The adapter's name.
        weights: Whether weights A and B will be drawn.

    Raises:
        TypeError: If a hook on a layer would do nothing or something else, or an
            adapter of another kind is in the network.
        ValueError: If the adapter has no LoRA layer, shares weights between two, or is
            not the only active one.
        RuntimeError: If ``net`` or a part of it is compiled already.
    """
    layers = {
        name: layer
        for name, layer in plain_net(net).named_modules()
        if isinstance(layer, LoraLayer) and adapter in layer.r
    }
    if not layers:
        raise ValueError(
            f"adapter {adapter!r} has no LoRA layer; inject one with "
            f"get_peft_model(net, LoraConfig(r=8, target_modules=[...]))"
        )
    for name, layer in layers.items():
        _check_layer(name, layer, adapter)
        if weights and not is_constant(layer, adapter):
            _check_weights(name, layer, adapter)
    refuse_stacked(net, adapter, layers)
    _refuse_attention_parts(net, layers)
    _warn_of_dropout(layers, adapter)
    if is_compiled(net):
        raise RuntimeError(
            "the network was compiled before the model was made, and compiled code "
            "ignores new hooks; make the model first, then call net.compile()"
        )
    return layers


def _check_layer(name: str, layer: LoraLayer, adapter: str) -> None:
    """Refuse a layer on which a hook would do nothing or something else."""
    kind = type(layer).__name__
    variant = type(layer.lora_variant.get(adapter)).__name__
    out = "leave it out of target_modules, or target the linear layers inside it"
    if kind not in _GATED:
        raise TypeError(
            f"{name!r} is a LoRA {kind} layer, whose rank activations do not pass "
            f"through a hooked module; {out}"
        )
    if adapter in layer.lora_variant and variant not in _VARIANTS:
        raise TypeError(
            f"{name!r} uses {variant}, which does not compute W0 x + scaling B diag(z) "
            f"A x; use plain LoRA, rsLoRA, or DoRA on linear layers"
        )


def _check_weights(name: str, layer: LoraLayer, adapter: str) -> None:
    """Refuse a layer whose output does not follow from its weight alone."""
    # PEFT makes A and B of the class of the convolution that they adapt
    for module in (layer.lora_A[adapter], layer.lora_B[adapter]):
        if isinstance(module, nn.Linear) or convolves(module):
            continue
        raise TypeError(
            f"A and B of {name!r} are {type(module).__name__} layers with a forward "
            f"pass of their own; drawn weights need torch's Linear, Conv1d, Conv2d or "
            f"Conv3d: use models.GateLoRA, or leave it out of target_modules"
        )


def _refuse_attention_parts(net: nn.Module, names: Iterable[str]) -> None:
    """Refuse ``out_proj`` of nn.MultiheadAttention, which reads only its weight."""
    for name in names:
        parent = plain_net(net).get_submodule(name.rpartition(".")[0])
        if isinstance(parent, nn.MultiheadAttention):
            raise TypeError(
                f"{name!r} belongs to an nn.MultiheadAttention, which reads the weight "
                f"of this module and never calls it; leave it out of target_modules "
                f"(LoraConfig's exclude_modules)"
            )


def _warn_of_dropout(layers: dict[str, LoraLayer], adapter: str) -> None:
    rates = {n: getattr(m.lora_dropout[adapter], "p", 0.0) for n, m in layers.items()}
    noisy = [name for name, rate in rates.items() if rate > 0]
    if noisy:
        warnings.warn(
            f"lora_dropout={rates[noisy[0]]} in {noisy[0]!r} is a second source of "
            f"noise beside the posterior; use LoraConfig(lora_dropout=0.0)",
            stacklevel=4,
        )
