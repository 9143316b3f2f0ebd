"""Private parts of PEFT."""

from peft.tuners.lora import LoraLayer, dora

__all__ = ["caches_dora_norms", "delete_from_layer"]


def caches_dora_norms() -> bool:
    """Whether `peft.helpers.DoraCaching` is on, under which draws are not seen.

    Private, since the helper is a switch that cannot be read.
    """
    return bool(dora.ENABLE_DORA_CACHING)


def delete_from_layer(layer: LoraLayer, adapter: str) -> None:
    """Delete an adapter from one layer, and activate no other one there.

    Private, since ``delete_adapter`` activates another in this layer alone.
    """
    active = layer.active_adapters
    layer._active_adapter = [name for name in active if name != adapter]
    layer.delete_adapter(adapter)
    layer._active_adapter = active
