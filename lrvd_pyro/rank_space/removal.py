"""Slicing what belongs to rank components: parameters and PEFT layers, in place.

Drivers hold on to the parameters that they train, so every tensor stays the object that
it is and only its data become smaller.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lrvd_pyro._compat.peft import delete_from_layer
from lrvd_pyro.rank_space.constant import groups_of, hold_constant

Cuts = dict[Tensor, tuple[int, Tensor]]  # a tensor's dimension, and which of it stay


def slice_tensors(cuts: Cuts) -> None:
    """Keep of each tensor the given indices along the given dimension."""
    for tensor, (dim, index) in cuts.items():
        data = tensor.data.index_select(dim, index.to(tensor.device))
        replace_data(tensor, data)


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a leaf tensor other data, of whatever shape; its gradient is dropped.

    A graph that is still alive, such as that of the last loss, keeps the tensor's
    gradient accumulator and with it the old shape; only data of another type make torch
    forget it, hence the step in between.
    """
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    tensor.grad = None
    if tensor.is_floating_point():
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data


def check_mask(keep: Tensor, size: int) -> None:
    """Raise unless ``keep`` is bool, (size,), and keeps something."""
    if keep.dtype != torch.bool or keep.shape != (size,) or not keep.any():
        raise ValueError(
            f"keep is {keep.dtype} {tuple(keep.shape)} with {int(keep.sum())} to keep; "
            f"expected torch.bool ({size},), one entry per rank component and one True "
            f"at least: guide.log_alpha <= 3"
        )


def layer_cuts(name: str, layer: LoraLayer, adapter: str, keep: Tensor) -> Cuts:
    """What goes from ``lora_A`` and ``lora_B`` when ``keep`` (r,) stays.

    One component stays in any case where a bias needs a layer to live in; no kind of
    layer computes without one, and PEFT knows no rank 0.

    Raises:
        TypeError: If the columns of ``lora_B`` are no rank components.
        ValueError: If a DoRA layer would be left without rank.
    """
    index = keep.nonzero().squeeze(-1)
    if len(index) == len(keep):
        return {}
    if groups_of(layer, adapter) > 1:
        raise TypeError(
            f"{name!r} is a grouped convolution, whose ranks are tied to its groups; "
            f"leave it out of target_modules to select ranks"
        )
    if len(index) == 0 and adapter in layer.lora_variant:
        raise ValueError(
            f"no rank of the DoRA layer {name!r} would stay, but its magnitude is no "
            f"part of any rank; keep one of them: prune(..., min_rank=1)"
        )
    if len(index) == 0 and layer.lora_bias.get(adapter):
        index = torch.zeros(1, dtype=torch.long)
    lora_A: Any = layer.lora_A[adapter]
    lora_B: Any = layer.lora_B[adapter]
    cuts: Cuts = {lora_A.weight: (0, index), lora_B.weight: (1, index)}
    if hasattr(lora_B, "center"):
        cuts[lora_B.center] = (0, index)
    return cuts


def resize_layer(layer: LoraLayer, adapter: str, rank: int) -> None:
    """Let a layer's attributes say that its weights have this rank now.

    At rank 0 the adapter leaves the layer, unless it has a bias: see `hold_constant`.
    The scaling stays as it is, which is then no longer ``lora_alpha / r``.
    """
    if rank == 0 and layer.lora_bias.get(adapter):
        hold_constant(layer, adapter)
        rank = 1
    elif rank == 0:
        delete_from_layer(layer, adapter)
        return
    layer.r[adapter] = rank
    for module, side in ((layer.lora_A, "out"), (layer.lora_B, "in")):
        kind = "channels" if hasattr(module[adapter], "kernel_size") else "features"
        setattr(module[adapter], f"{side}_{kind}", rank)
