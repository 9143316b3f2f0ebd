"""The likelihood of regression, and its prediction."""

import math
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from lrvd_pyro._numbers import check_number
from lrvd_pyro.likelihoods.base import data_plate, precise, samples_first

__all__ = ["Normal", "NormalPrediction"]


@dataclass(frozen=True)
class NormalPrediction:
    """The posterior predictive of a regression for n data, from S samples.

    Attributes:
        mean: The predictive mean, ``n``.
        variance: The predictive variance, ``n``: the noise plus the variance of the
            means over the samples.
        entropy: The entropy of the Gaussian with that variance, ``n``, in nats.
        mutual_information: ``log(variance / noise) / 2``, ``n``, in nats; exact if the
            means are Gaussian.
        samples: The mean of each sample, ``S x n``, if asked for, else None.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor
    mutual_information: Tensor
    samples: Tensor | None = None


class Normal(PyroModule):
    """Regression: ``labels ~ Normal(predictions, scale)`` with a learned ``scale``.

    Wrong when the noise differs between examples: all share one ``scale``.

    Args:
        scale: The initial standard deviation of the noise, in units of the labels.

    Raises:
        ValueError: If ``scale`` is not positive and finite.

    Example::

        GateLoRA(net, likelihood=Normal(scale=0.5), num_data=len(train))
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        deviation = "a positive standard deviation: Normal(scale=1.0)"
        check_number("scale", scale, deviation, lambda sd: 0 < sd < math.inf)
        self.scale: Any = PyroParam(torch.tensor(scale), constraints.positive)

    def forward(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        """Observe the labels, or sample them if None.

        Args:
            predictions: The means, ``B`` or ``B x 1``.
            labels: The labels, ``B``, floating point.
            num_data: The number N of examples in the data set.

        Raises:
            TypeError: If labels are not floating point.
            ValueError: If there is not one prediction per example, or not one label
                per prediction.
        """
        mean = self._mean(predictions)
        if labels is not None and not labels.is_floating_point():
            raise TypeError(
                f"labels have dtype {labels.dtype}; expected floating point: "
                f"labels.float() (for classes, likelihoods.Categorical())"
            )
        if labels is not None and labels.shape != mean.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and predictions "
                f"{tuple(predictions.shape)}; expected one label per prediction"
            )
        with data_plate(len(mean), labels, num_data):
            # the scale stays where it was made when only the network is moved
            noise = dist.Normal(mean, self.scale.to(mean.device), validate_args=False)
            pyro.sample("labels", noise, obs=labels)

    def _mean(self, predictions: Tensor) -> Tensor:
        if predictions.dim() == 2 and predictions.shape[1] == 1:
            predictions = predictions.squeeze(1)
        if predictions.dim() != 1:
            raise ValueError(
                f"predictions have shape {tuple(predictions.shape)}; expected one per "
                f"example: load the network with num_labels=1"
            )
        return precise(predictions)

    def fisher_roots(self, predictions: Tensor) -> Tensor:
        """``mean / scale``, ``B x 1``, with the scale held constant."""
        mean = self._mean(predictions)
        root: Tensor = mean / self.scale.detach().to(mean.device)
        return root.unsqueeze(-1)

    def contrasts(self, predictions: Tensor) -> Tensor:
        """The means, ``B x 1``."""
        return self._mean(predictions).unsqueeze(-1)

    def from_contrasts(self, contrasts: Tensor) -> Tensor:
        """The means, ``S x B x 1``, which are the contrasts themselves."""
        return contrasts

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        """The fields of `NormalPrediction` from means, ``S x B`` or ``S x B x 1``."""
        means = torch.stack([self._mean(p) for p in predictions])
        noise = self.scale.detach().to(means.device).square()
        variance = noise + means.var(0, correction=0)
        return {
            "mean": means.mean(0),
            "variance": variance,
            "entropy": 0.5 * (2 * math.pi * math.e * variance).log(),
            "mutual_information": 0.5 * (variance / noise).log(),
            "samples": means.transpose(0, 1),
        }

    def collect(self, fields: dict[str, Tensor]) -> NormalPrediction:
        """The prediction for all data from the fields of `summarize`."""
        return NormalPrediction(**samples_first(fields))
