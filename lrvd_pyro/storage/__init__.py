"""Save and load a posterior, and export its mean to plain PEFT."""

from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import load, save

__all__ = ["export_peft", "load", "save"]
