"""Adapted networks as generative Pyro programs, one file a model.

`RankModel` says what a new model gives, with an example. A new file here is imported
below, and its class added to ``__all__``.
"""

# Imported as plain ``models`` this folder would load a second copy of every class.
if __name__ != "lrvd_pyro.models":
    raise ImportError("import lrvd_pyro.models, not models")

from lrvd_pyro.models.base import RankModel
from lrvd_pyro.models.factor_lora import FactorLoRA
from lrvd_pyro.models.factors import Factors
from lrvd_pyro.models.gate_lora import GateLoRA

__all__ = ["FactorLoRA", "Factors", "GateLoRA", "RankModel"]
