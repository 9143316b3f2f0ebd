"""Slice the parameters and PEFT layers of rank components, in place.

SVI and optimizers keep references to the parameters that they train. A new parameter
object would stop training in silence, so only the data of each tensor become smaller.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lrvd_pyro._compat.peft import delete_from_layer
from lrvd_pyro.rank_space.constant import groups_of, hold_constant

__all__ = [
    "Cuts",
    "check_mask",
    "layer_cuts",
    "replace_data",
    "resize_layer",
    "slice_tensors",
    "sliced_for_a_trial",
]

Cuts = dict[Tensor, tuple[int, Tensor]]  # the dimension to slice, the indices that stay


def slice_tensors(cuts: Cuts) -> None:
    """Keep only the given indices along the given dimension of each tensor."""
    for tensor, (dim, index) in cuts.items():
        data = tensor.data.index_select(dim, index.to(tensor.device))
        replace_data(tensor, data)


@contextmanager
def sliced_for_a_trial(cuts: Cuts) -> Iterator[None]:
    """Slice the tensors within the block alone; data and gradients come back."""
    before = {tensor: (tensor.data, tensor.grad) for tensor in cuts}
    try:
        slice_tensors(cuts)
        yield
    finally:
        for tensor, (data, gradient) in before.items():
            replace_data(tensor, data)
            tensor.grad = gradient


def replace_data(tensor: Tensor, data: Tensor) -> None:
    """Give a leaf tensor other data, of any shape; its gradient is dropped."""
    # A graph that is still alive, such as that of the last loss, keeps the tensor's
    # gradient accumulator and its old shape. torch makes a new accumulator only after
    # data of another dtype, so such data are set in between.
    other = torch.float16 if data.dtype != torch.float16 else torch.float32
    tensor.grad = None
    if tensor.is_floating_point():
        tensor.data = data.new_empty(0, dtype=other)
    tensor.data = data


def check_mask(keep: Tensor, size: int) -> None:
    """Raise unless ``keep`` is a tensor, bool, ``size``, and keeps a component."""
    if not isinstance(keep, Tensor):
        raise TypeError(
            f"keep is a {type(keep).__name__}; expected a tensor, torch.bool ({size},),"
            f" one entry per rank component: guide.log_alpha <= 3"
        )
    if keep.dtype != torch.bool or keep.shape != (size,) or not keep.any():
        raise ValueError(
            f"keep is {keep.dtype} {tuple(keep.shape)} with {int(keep.sum())} to keep; "
            f"expected torch.bool ({size},), one entry per rank component and at least "
            f"one True: guide.log_alpha <= 3"
        )


def layer_cuts(name: str, layer: LoraLayer, adapter: str, keep: Tensor) -> Cuts:
    """The cuts of ``lora_A`` and ``lora_B`` that leave the components ``keep``.

    A layer with a bias keeps at least one component.

    Args:
        name: The layer's name, for messages.
        layer: The LoRA layer; it is not changed.
        adapter: The adapter's name.
        keep: The components that stay, ``r``, bool.

    Raises:
        TypeError: If the layer is a grouped convolution.
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
            f"no rank of the DoRA layer {name!r} would stay, but its magnitude belongs "
            f"to the layer as a whole; keep at least one: prune(..., min_rank=1)"
        )
    if len(index) == 0 and layer.lora_bias.get(adapter):
        # PEFT refuses rank 0, and the bias needs a layer: one component stays as its
        # carrier, until `hold_constant` replaces its weights by zeros
        index = torch.zeros(1, dtype=torch.long)
    lora_A: Any = layer.lora_A[adapter]
    lora_B: Any = layer.lora_B[adapter]
    cuts: Cuts = {lora_A.weight: (0, index), lora_B.weight: (1, index)}
    if hasattr(lora_B, "center"):
        cuts[lora_B.center] = (0, index)
    return cuts


def resize_layer(layer: LoraLayer, adapter: str, rank: int) -> None:
    """Set a layer's attributes to the rank that its sliced weights have now.

    At rank 0 the adapter leaves the layer; if it has a bias, see `hold_constant`.
    """
    # layer.scaling stays: lora_alpha / rank would change what the kept ranks compute
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
