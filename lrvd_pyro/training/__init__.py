"""Training runs that are killed, and go on bit for bit."""

from lrvd_pyro.training.checkpoints import checkpoint, resume
from lrvd_pyro.training.sampler import ResumableSampler

__all__ = ["ResumableSampler", "checkpoint", "resume"]
