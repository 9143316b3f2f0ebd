"""Likelihoods: from the network's predictions to the observed labels.

The data plate, and with it the factor N/B that scales a batch to the data set, stands
here and nowhere else.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import pyro
import torch
from pyro import distributions as dist
from pyro.distributions import constraints
from pyro.infer.util import is_validation_enabled
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.nn import functional as F


class Likelihood(Protocol):
    """What a model asks of its likelihood."""

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        """Observe ``labels`` (or sample them) at the site ``labels``."""

    def fisher_roots(self, predictions: Tensor) -> Tensor:
        """``B x K`` functions of ``B x ...`` predictions, differentiable.

        The outer products of their gradients sum to the Fisher information of each
        example.
        """

    def contrasts(self, predictions: Tensor) -> Tensor:
        """``B x K`` linear functions of ``B x ...`` predictions.

        The likelihood must depend on the predictions through them alone. The linearised
        predictive takes one backward pass for each.
        """

    def from_contrasts(self, contrasts: Tensor) -> Tensor:
        """``S x B x ...`` predictions that have the contrasts ``S x B x K``."""

    def summarise(self, predictions: Tensor) -> dict[str, Tensor]:
        """Reduce ``S x B x ...`` predictions to the fields of `collect`."""

    def collect(self, fields: dict[str, Tensor]) -> Any:
        """The prediction for all data from the concatenated fields."""


def data_plate(size: int, labels: Tensor | None, num_data: int) -> Any:
    """The plate ``data``, whose scale is N/B when labels are observed.

    Raises:
        ValueError: If a labelled batch is larger than the data set.
    """
    if labels is None:
        return pyro.plate("data", size)
    if size > num_data:
        raise ValueError(
            f"a labelled batch has {size} examples but num_data={num_data}; expected "
            f"the size of the training set: GateLoRA(..., num_data=len(train))"
        )
    return pyro.plate("data", num_data, subsample=torch.empty(size))


def precise(predictions: Tensor) -> Tensor:
    """Half precision as float32; 16 bits cost hundredths of a nat in a likelihood."""
    half = predictions.dtype in (torch.bfloat16, torch.float16)
    return predictions.float() if half else predictions


@dataclass(frozen=True)
class CategoricalPrediction:
    """The posterior predictive of a classifier for n data, from S samples.

    Attributes:
        probs: ``n x C``, mean over samples of the class probabilities.
        entropy: ``n``, total uncertainty: the entropy of ``probs``, in nats.
        mutual_information: ``n``, the epistemic part: entropy of the mean minus mean
            of the entropies, in nats.
        samples: ``S x n x C`` probabilities if asked for, else None.
    """

    probs: Tensor
    entropy: Tensor
    mutual_information: Tensor
    samples: Tensor | None = None


class Categorical:
    """Classification: ``labels ~ Categorical(logits)``, logits ``B x C``, labels ``B``.

    Raises:
        TypeError: If labels are not integers.
        ValueError: If there is not one label per row of logits, or a label lies outside
            ``0 .. C - 1``.
    """

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        if labels is not None:
            self._check(predictions, labels)
        with data_plate(len(predictions), labels, num_data):
            pyro.sample(
                "labels",
                dist.Categorical(logits=precise(predictions), validate_args=False),
                obs=labels,
            )

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"labels have dtype {labels.dtype}; expected integers, one class index "
                f"per example: labels.long() (for regression, likelihoods.Normal())"
            )
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and logits "
                f"{tuple(logits.shape)}; expected one label per row of logits"
            )
        if labels.device.type != "cpu" and not is_validation_enabled():
            return
        low, high, classes = int(labels.min()), int(labels.max()), logits.shape[1]
        if low < 0 or high >= classes:
            raise ValueError(
                f"labels lie in {low} .. {high} but the network has {classes} classes; "
                f"expected 0 .. {classes - 1}: "
                + ("leave out rows without a label" if low < 0 else "")
                + (f"load it with num_labels={high + 1}" if high >= classes else "")
            )

    def fisher_roots(self, predictions: Tensor) -> Tensor:
        log_probs = precise(predictions).log_softmax(-1)
        return (0.5 * log_probs.detach()).exp() * log_probs

    def contrasts(self, predictions: Tensor) -> Tensor:
        """The differences of the logits to those of class 0, ``B x (C - 1)``."""
        if predictions.dim() != 2 or predictions.shape[1] < 2:
            raise ValueError(
                f"logits have shape {tuple(predictions.shape)}; the linearised "
                f"predictive takes B x C, two classes or more: "
                f'predict(..., method="sample")'
            )
        logits = precise(predictions)
        return logits[:, 1:] - logits[:, :1]

    def from_contrasts(self, contrasts: Tensor) -> Tensor:
        return F.pad(contrasts, (1, 0))

    def summarise(self, predictions: Tensor) -> dict[str, Tensor]:
        samples = precise(predictions).softmax(-1)
        probs = samples.mean(0)
        entropy = torch.special.entr(probs).sum(-1)
        aleatoric = torch.special.entr(samples).sum(-1).mean(0)
        return {
            "probs": probs,
            "entropy": entropy,
            "mutual_information": (entropy - aleatoric).clamp(min=0),
            "samples": samples.transpose(0, 1),
        }

    def collect(self, fields: dict[str, Tensor]) -> CategoricalPrediction:
        return CategoricalPrediction(**_samples_first(fields))


@dataclass(frozen=True)
class NormalPrediction:
    """The posterior predictive of a regression for n data, from S samples.

    Attributes:
        mean: ``n``, predictive mean.
        variance: ``n``, predictive variance: noise plus spread of the means.
        entropy: ``n``, of the Gaussian with that variance, in nats.
        mutual_information: ``n``, ``log(variance / noise) / 2``, in nats; exact if the
            means are Gaussian.
        samples: ``S x n`` means if asked for, else None.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor
    mutual_information: Tensor
    samples: Tensor | None = None


class Normal(PyroModule):
    """Regression: ``labels ~ Normal(predictions, scale)`` with a learned ``scale``.

    Predictions are ``B`` or ``B x 1``, labels ``B`` and floating point.

    Args:
        scale: The initial standard deviation of the noise.

    Raises:
        TypeError: If labels are not floating point.
        ValueError: If ``scale`` is not positive, or there is not one label per
            prediction.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale={scale}; expected a positive standard deviation")
        self.scale: Any = PyroParam(torch.tensor(scale), constraints.positive)

    def forward(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
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
        mean = self._mean(predictions)
        root: Tensor = mean / self.scale.detach().to(mean.device)
        return root.unsqueeze(-1)

    def contrasts(self, predictions: Tensor) -> Tensor:
        """The mean, ``B x 1``."""
        return self._mean(predictions).unsqueeze(-1)

    def from_contrasts(self, contrasts: Tensor) -> Tensor:
        return contrasts

    def summarise(self, predictions: Tensor) -> dict[str, Tensor]:
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
        return NormalPrediction(**_samples_first(fields))


def _samples_first(fields: dict[str, Tensor]) -> dict[str, Any]:
    samples = fields.get("samples")
    if samples is None:
        return dict(fields)
    return fields | {"samples": samples.transpose(0, 1)}
