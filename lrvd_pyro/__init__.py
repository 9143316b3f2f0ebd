"""Bayesian low-rank adaptation: the LoRA-adapted network as a Pyro model."""

from lrvd_pyro import (
    diagnostics,
    distributions,
    gauge,
    guides,
    inference,
    likelihoods,
    models,
    optim,
    predictive,
    priors,
    rank_space,
    selection,
    storage,
    testing,
    training,
)
from lrvd_pyro._version import __version__
from lrvd_pyro.diagnostics import calibration, plots, to_arviz
from lrvd_pyro.inference import RankELBO, linear_warmup
from lrvd_pyro.predictive import posterior_mean, posterior_sample, predict
from lrvd_pyro.rank_space import RankSpace
from lrvd_pyro.selection import RankHistory, RankSchedule, free_lower_layers, prune
from lrvd_pyro.storage import export_peft, load, save
from lrvd_pyro.training import ResumableSampler, checkpoint, resume

__all__ = [
    "RankELBO",
    "RankHistory",
    "RankSchedule",
    "RankSpace",
    "ResumableSampler",
    "__version__",
    "calibration",
    "checkpoint",
    "diagnostics",
    "distributions",
    "export_peft",
    "free_lower_layers",
    "gauge",
    "guides",
    "inference",
    "likelihoods",
    "linear_warmup",
    "load",
    "models",
    "optim",
    "plots",
    "posterior_mean",
    "posterior_sample",
    "predict",
    "predictive",
    "priors",
    "prune",
    "rank_space",
    "resume",
    "save",
    "selection",
    "storage",
    "testing",
    "to_arviz",
    "training",
]


def __dir__() -> list[str]:
    return __all__
