"""Likelihoods: from the network's predictions to the observed labels."""

from lrvd_pyro.likelihoods.base import Likelihood, data_plate
from lrvd_pyro.likelihoods.categorical import Categorical, CategoricalPrediction
from lrvd_pyro.likelihoods.normal import Normal, NormalPrediction

__all__ = [
    "Categorical",
    "CategoricalPrediction",
    "Likelihood",
    "Normal",
    "NormalPrediction",
    "data_plate",
]
