"""The names that parts of a PEFT network have in the network without PEFT."""

from lrvd_pyro.rank_space.find import PREFIX

__all__ = ["is_adapters", "plain_name"]

# PEFT keeps a wrapped layer, a head, and an embedding of which tokens train by these.
_WRAPPERS = ("base_layer", "original_module", "token_adapter")
_OWN = ("modules_to_save", "lora_", "trainable_tokens_")


def plain_name(name: str) -> str:
    """The name that a tensor or module has in the network without PEFT."""
    parts = name.removeprefix(PREFIX).split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def is_adapters(name: str) -> bool:
    """Whether a tensor in PEFT's network belongs to an adapter, by its full name."""
    return any(part.startswith(_OWN) for part in name.split("."))
