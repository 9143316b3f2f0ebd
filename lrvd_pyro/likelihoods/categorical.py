"""Classification."""

from dataclasses import dataclass

import pyro
import torch
from pyro import distributions as dist
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.nn import functional as F

from lrvd_pyro.likelihoods.base import data_plate, precise, samples_first


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
                f"logits have shape {tuple(predictions.shape)}; the linearized "
                f"predictive takes B x C, two classes or more: "
                f'predict(..., method="sample")'
            )
        logits = precise(predictions)
        return logits[:, 1:] - logits[:, :1]

    def from_contrasts(self, contrasts: Tensor) -> Tensor:
        return F.pad(contrasts, (1, 0))

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
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
        return CategoricalPrediction(**samples_first(fields))
