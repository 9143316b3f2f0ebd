"""Private parts of Transformers."""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

__all__ = [
    "attention_implementation",
    "checkpointing_blocks",
    "checkpointing_function",
    "forget_adapters",
    "is_from_checkpoint",
    "set_checkpointing_function",
    "tied_names",
]

_FUNCTION = "_gradient_checkpointing_func"


def checkpointing_blocks(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network that can recompute their activations."""
    return [m for m in net.modules() if hasattr(m, "gradient_checkpointing")]


def checkpointing_function(block: nn.Module) -> Callable[..., Any] | None:
    """The function that a block's activation checkpointing calls; None if it is off.

    Private, since ``gradient_checkpointing_enable`` accepts options, not a function.
    """
    # Transformers' blocks keep their activations in evaluation mode, whatever the flag.
    if not (block.gradient_checkpointing and block.training):
        return None
    function: Callable[..., Any] | None = getattr(block, _FUNCTION, None)
    return function


def set_checkpointing_function(block: nn.Module, function: Callable[..., Any]) -> None:
    """Set the function that a block's activation checkpointing calls.

    Private for the same reason as `checkpointing_function`.
    """
    setattr(block, _FUNCTION, function)


def attention_implementation(net: PreTrainedModel) -> Any:
    """The attention implementation that a network was loaded with.

    Private, since ``from_pretrained`` accepts it and no public name returns it.
    """
    return net.config._attn_implementation


def forget_adapters(net: nn.Module) -> None:
    """Tell a network that it has no adapter left, so that it saves itself whole.

    Private, since ``delete_adapter`` keeps the LoRA layers, and no public name ends it.
    """
    if isinstance(net, PreTrainedModel):
        net._hf_peft_config_loaded = False


def is_from_checkpoint(parameter: nn.Parameter) -> bool:
    """Whether ``from_pretrained`` found the values of a parameter in its checkpoint.

    Private, since ``output_loading_info`` tells it only to the caller that loads.
    """
    return bool(getattr(parameter, "_is_hf_initialized", False))


def tied_names(net: nn.Module) -> dict[str, str]:
    """The names of parameters that a network ties, each with that of the first one.

    Private, since no documented name tells it once the parameters lie on disk.
    """
    return getattr(net, "all_tied_weights_keys", {})
