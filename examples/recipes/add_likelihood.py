"""Add a likelihood: an object with three methods. Here: Poisson counts."""

from types import SimpleNamespace

import pyro
from pyro import distributions as dist
from torch import Tensor

from lrvd_pyro.likelihoods import data_plate, samples_first


class Poisson:
    """``labels ~ Poisson(exp(prediction))``, predictions B x 1, labels B."""

    def __call__(self, log_rate: Tensor, labels: Tensor | None, num_data: int) -> None:
        with data_plate(len(log_rate), labels, num_data):
            pyro.sample("labels", dist.Poisson(log_rate.exp().squeeze(-1)), obs=labels)

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        rates = predictions.exp().squeeze(-1)  # one row for each draw
        return {"rate": rates.mean(0), "sd": rates.std(0), "samples": rates.T}

    def collect(self, fields: dict[str, Tensor]) -> SimpleNamespace:
        return SimpleNamespace(**samples_first(fields))

    def fisher_roots(self, predictions: Tensor) -> Tensor:
        """Optional: the curvature that `gauge` and Laplace need."""
        return 2 * (predictions / 2).exp()
