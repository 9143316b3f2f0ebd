"""Cuts of a module's tensors that have one entry per rank component, or per group."""

from torch import Tensor, nn

from lrvd_pyro.rank_space.removal import Cuts
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["named_cuts"]


def named_cuts(
    space: RankSpace, keep: Tensor, module: nn.Module, without: tuple[str, ...] = ()
) -> Cuts:
    """The cuts of parameters and buffers along their first dimension.

    A tensor has one row per rank component, or one per group under a name that
    `RankSpace.indices_kept` understands. Scalars, and vectors of one number, stay
    whole.

    Args:
        space: The rank space.
        keep: The rank components that stay, ``R``, bool.
        module: The module.
        without: How the names of the tensors begin that stay whole.

    Raises:
        TypeError: If a tensor belongs to no components that can be told.
    """
    cuts: Cuts = {}
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dim() == 0 or name.startswith(without):
            continue
        where = f"{type(module).__name__}.{name}"
        # Of several dimensions the first need not be that of the ranks.
        if space.size in tensor.shape[1:] or (tensor.dim() > 1 and len(tensor) == 1):
            raise TypeError(
                f"{where!r} has shape {tuple(tensor.shape)}, and nothing says which "
                f"dimension has the {space.size} rank components; put them first and "
                f"alone, or override cuts(keep)"
            )
        cuts[tensor] = 0, space.indices_kept(keep, where, len(tensor))
    return cuts
