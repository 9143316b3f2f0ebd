"""Optimizers: one fused AdamW for SVI, and parameter groups for torch."""

from lrvd_pyro.optim.adamw import AdamW
from lrvd_pyro.optim.groups import Optimizer, parameter_groups

__all__ = ["AdamW", "Optimizer", "parameter_groups"]
