"""A posterior on disk, and its mean as plain PEFT."""

from lrvd_pyro.storage.export import export_peft
from lrvd_pyro.storage.folder import load, save

__all__ = ["export_peft", "load", "save"]
