"""Likelihoods: from the network's predictions to the observed labels.

A likelihood is any object with the three methods of `Likelihood`. `Curvature` and
`Contrasts` are optional capabilities. To add a likelihood, write a file like
``categorical.py`` and list its class here.
"""

from lrvd_pyro.likelihoods.base import (
    Contrasts,
    Curvature,
    Likelihood,
    data_plate,
    samples_first,
)
from lrvd_pyro.likelihoods.categorical import Categorical, CategoricalPrediction
from lrvd_pyro.likelihoods.normal import Normal, NormalPrediction

__all__ = [
    "Categorical",
    "CategoricalPrediction",
    "Contrasts",
    "Curvature",
    "Likelihood",
    "Normal",
    "NormalPrediction",
    "data_plate",
    "samples_first",
]
