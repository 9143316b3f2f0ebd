"""Private parts of PEFT."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer, dora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from lrvd_pyro._compat.transformers import forget_adapters

__all__ = ["caches_dora_norms", "delete_from_layer", "unloaded"]


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


def unloaded(net: nn.Module, merge: Sequence[str] = ()) -> Any:
    """Take every adapter out of a network in place, after merging some into it.

    Private, since PEFT unloads a PeftModel alone, and ``net.add_adapter`` makes none.

    Args:
        net: A PeftModel, or a network with adapters of its own.
        merge: The names of the adapters to add to the weights.

    Returns:
        The network without PEFT; trained heads stay, as in ``PeftModel.unload``.
    """
    if isinstance(net, PeftModel):
        plain = net.merge_and_unload(adapter_names=[*merge]) if merge else net.unload()
        forget_adapters(plain)
        return plain
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrapped = {name: m for name, m in net.named_modules() if isinstance(m, kinds)}
    for name, module in wrapped.items():
        if any(name.startswith(f"{outer}.") for outer in wrapped):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(
                merge=bool(merge), safe_merge=False, adapter_names=[*merge] or None
            )
        else:
            if merge:
                module.merge(adapter_names=[*merge])
            plain = module.get_base_layer()
        net.set_submodule(name, plain)
    del net.peft_config
    forget_adapters(net)
    return net
