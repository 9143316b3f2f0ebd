"""The posterior predictive: streamed, under one draw, at the mean, or linearized."""

from lrvd_pyro.predictive.predictive import posterior_mean, posterior_sample, predict

__all__ = ["posterior_mean", "posterior_sample", "predict"]
