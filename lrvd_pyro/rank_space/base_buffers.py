"""What a base computes with beside its parameters, such as running statistics."""

from torch import Tensor, nn

from lrvd_pyro._compat.torch import persistent_buffers
from lrvd_pyro.rank_space.find import plain_net
from lrvd_pyro.rank_space.names import is_adapters, plain_name

__all__ = ["base_buffers", "copied_buffers"]


def base_buffers(net: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a base that training may move, uncopied.

    Buffers within an adapter, ``modules_to_save`` included, are not among them.

    Args:
        net: A network, with PEFT or without.

    Returns:
        The buffers by their names in the network without PEFT.
    """
    return {
        plain_name(full): buffer
        for name, module in plain_net(net).named_modules()
        for key, buffer in persistent_buffers(module)
        if _may_move(buffer) and not is_adapters(full := f"{name}.{key}".lstrip("."))
    }


def copied_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Copies of `base_buffers`, as they are now."""
    named = base_buffers(net).items()
    return {name: buffer.detach().clone() for name, buffer in named}


def _may_move(buffer: Tensor) -> bool:
    # Integers in rows and columns are packed weights, too large to copy. What is on
    # the meta device has no values.
    return not buffer.is_meta and (buffer.is_floating_point() or buffer.dim() < 2)
