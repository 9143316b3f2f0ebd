"""Adapted networks as generative Pyro programs, one file a model."""

# Imported as plain ``models`` this folder would load a second copy of every class.
if __name__ != "lrvd_pyro.models":
    raise ImportError("import lrvd_pyro.models, not models")

from lrvd_pyro.models.base import Factors, RankModel
from lrvd_pyro.models.factor_lora import FactorLoRA
from lrvd_pyro.models.gate_lora import GateLoRA

__all__ = ["FactorLoRA", "Factors", "GateLoRA", "RankModel"]
