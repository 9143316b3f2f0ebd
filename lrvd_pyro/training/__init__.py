"""Checkpoints of training runs, which go on bit for bit after a kill."""

from lrvd_pyro.training.checkpoints import checkpoint, resume
from lrvd_pyro.training.sampler import ResumableSampler

__all__ = ["ResumableSampler", "checkpoint", "resume"]
