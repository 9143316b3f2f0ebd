"""Bayesian low-rank adaptation: the LoRA-adapted network as a Pyro model."""

from lrvd_pyro import (
    calibration,
    distributions,
    gauge,
    guides,
    likelihoods,
    models,
    optim,
    plots,
    priors,
    testing,
)
from lrvd_pyro.checkpoint import checkpoint, resume
from lrvd_pyro.depth import free_lower_layers
from lrvd_pyro.elbo import RankELBO, linear_warmup
from lrvd_pyro.export import export_peft
from lrvd_pyro.inference_data import to_arviz
from lrvd_pyro.predict import posterior_mean, posterior_sample, predict
from lrvd_pyro.pruning import prune
from lrvd_pyro.rank_schedule import RankHistory, RankSchedule
from lrvd_pyro.rank_space import RankSpace
from lrvd_pyro.sampler import ResumableSampler
from lrvd_pyro.storage import load, save

__version__ = "0.1.0"

__all__ = [
    "RankELBO",
    "RankHistory",
    "RankSchedule",
    "RankSpace",
    "ResumableSampler",
    "calibration",
    "checkpoint",
    "distributions",
    "export_peft",
    "free_lower_layers",
    "gauge",
    "guides",
    "likelihoods",
    "linear_warmup",
    "load",
    "models",
    "optim",
    "plots",
    "posterior_mean",
    "posterior_sample",
    "predict",
    "priors",
    "prune",
    "resume",
    "save",
    "testing",
    "to_arviz",
]
