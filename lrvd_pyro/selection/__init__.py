"""Rank selection: which rank components stay, and their removal all over."""

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
