"""The rank components of a PEFT LoRA model as one vector space; no Pyro.

`RankSpace` numbers them, binds draws into the forward pass and removes components.
"""

from lrvd_pyro.rank_space.coordinates import Coordinates, Level
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["Coordinates", "Cuts", "Level", "RankSpace", "slice_tensors"]
