"""Rank selection: which rank components stay, and how the others are removed.

`prune` chooses by a criterion, `RankSchedule` prunes while training goes on, and
`free_lower_layers` chooses whole layers. All of them end in `select`, which removes
components from network, guide, prior and optimizer at once. `RankHistory` records log
alpha on the way. Another way to choose is a function that makes a mask for `select`.
"""

from lrvd_pyro.selection.criteria import prune, removal_cost
from lrvd_pyro.selection.history import RankHistory
from lrvd_pyro.selection.lower_layers import free_lower_layers
from lrvd_pyro.selection.removal import select
from lrvd_pyro.selection.schedule import RankSchedule

__all__ = [
    "RankHistory",
    "RankSchedule",
    "free_lower_layers",
    "prune",
    "removal_cost",
    "select",
]
