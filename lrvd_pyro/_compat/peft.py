"""Private parts of PEFT."""

from peft.tuners.lora import LoraLayer, dora

__all__ = ["caches_dora_norms", "delete_from_layer"]


def caches_dora_norms() -> bool:
    """Whether `peft.helpers.DoraCaching` is on, under which DoRA norms ignore draws.

    Private, since the helper sets a switch and no public name reads it.
    """
    return bool(dora.ENABLE_DORA_CACHING)


def delete_from_layer(layer: LoraLayer, adapter: str) -> None:
    """Delete an adapter from one layer, without activating another one there.

    Private, since ``delete_adapter`` activates another adapter in this layer alone, so
    that the layers of a network differ in their active adapters.
    """
    active = layer.active_adapters
    layer._active_adapter = [name for name in active if name != adapter]
    layer.delete_adapter(adapter)
    layer._active_adapter = active
