"""Cuts of a module's tensors that have one entry per rank component, or per group."""

from torch import Tensor, nn

from lrvd_pyro.rank_space.removal import Cuts
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["named_cuts"]


def named_cuts(
    space: RankSpace, keep: Tensor, module: nn.Module, without: tuple[str, ...] = ()
) -> Cuts:
    """The cuts of parameters and buffers along their first dimension.

    A tensor has one entry per rank component, or one per group under a name that
    `RankSpace.indices_kept` understands. Scalars stay whole.

    Args:
        space: The rank space.
        keep: The rank components that stay, ``R``, bool.
        module: The module.
        without: How the names of the tensors begin that stay whole.

    Raises:
        TypeError: If a tensor belongs to no components that can be told.
    """
    owner = type(module).__name__
    return {
        tensor: (0, space.indices_kept(keep, f"{owner}.{name}", len(tensor)))
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if tensor.dim() > 0 and not name.startswith(without)
    }
