"""The rank components of a PEFT LoRA model as one vector space; knows no Pyro.

`RankSpace` numbers the components, binds draws into the forward pass and removes
components. To admit another layer kind, start in ``find.py``.
"""

from lrvd_pyro.rank_space.coordinates import Coordinates, Level
from lrvd_pyro.rank_space.cuts import named_cuts
from lrvd_pyro.rank_space.removal import Cuts, slice_tensors
from lrvd_pyro.rank_space.space import RankSpace

__all__ = ["Coordinates", "Cuts", "Level", "RankSpace", "named_cuts", "slice_tensors"]
