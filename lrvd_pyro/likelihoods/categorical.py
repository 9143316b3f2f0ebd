"""The likelihood of classification, and its prediction."""

from dataclasses import dataclass

import pyro
import torch
from pyro import distributions as dist
from pyro.infer.util import is_validation_enabled
from torch import Tensor
from torch.nn import functional as F

from lrvd_pyro.likelihoods.base import data_plate, precise, samples_first

__all__ = ["Categorical", "CategoricalPrediction"]


@dataclass(frozen=True)
class CategoricalPrediction:
    """The posterior predictive of a classifier for n data, from S samples.

    Attributes:
        probs: The class probabilities, averaged over the samples, ``n x C``. A network
            with several predictions per datum gives ``n x ... x C``, and all other
            fields have these dimensions too.
        entropy: The entropy of ``probs``, ``n``, in nats: the total uncertainty.
        mutual_information: The entropy of the mean minus the mean of the entropies,
            ``n``, in nats: the epistemic part of the uncertainty.
        samples: The probabilities of each sample, ``S x n x C``, if asked
            for, else None.
    """

    probs: Tensor
    entropy: Tensor
    mutual_information: Tensor
    samples: Tensor | None = None

    def __getitem__(self, index: Tensor) -> "CategoricalPrediction":
        """The prediction for some of the data, or for some tokens of all data.

        Example::

            kept = labels != -100
            calibration_report(prediction[kept], labels[kept])

        Args:
            index: As of the labels: bool, ``n`` or ``n x ...``, or indices of data.
        """
        index = index.to(self.entropy.device)
        samples = None if self.samples is None else self.samples[:, index]
        return CategoricalPrediction(
            self.probs[index],
            self.entropy[index],
            self.mutual_information[index],
            samples,
        )


class Categorical:
    """Classification: ``labels ~ Categorical(logits)``.

    Wrong when a row has no label (-100, say): leave such rows out.

    Example::

        GateLoRA(net, likelihood=Categorical(), num_data=len(train))
    """

    def __call__(
        self, predictions: Tensor, labels: Tensor | None, num_data: int
    ) -> None:
        """Observe the labels, or sample them if None.

        Args:
            predictions: The logits, ``B x C``.
            labels: Integer class indices, ``B``.
            num_data: The number N of examples in the data set.

        Raises:
            TypeError: If labels are not integers.
            ValueError: If there is not one label per row of logits, or if a label lies
                outside ``0 .. C - 1``.
        """
        if labels is not None:
            self._check(predictions, labels)
        with data_plate(len(predictions), labels, num_data):
            # `_check` has validated the labels, with a message that helps
            fn = dist.Categorical(logits=precise(predictions), validate_args=False)
            pyro.sample("labels", fn, obs=labels)

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if labels.is_floating_point() or labels.is_complex():
            raise TypeError(
                f"labels have dtype {labels.dtype}; expected integers, one class index "
                f"per example: labels.long() (for regression, likelihoods.Normal())"
            )
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} and logits "
                f"{tuple(logits.shape)}; expected one label per row of logits. Several "
                f"labels per example take a likelihood of your own, with "
                f"fn.to_event(labels.dim() - 1): see likelihoods.Likelihood"
            )
        # Reading the labels makes the host wait for an accelerator at each step.
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
        """``L^T c``, ``B x (C - 1)``: c are the contrasts, and L is held constant.

        The Fisher information about c is ``diag(p) - p p^T``, p without class 0. L is
        its Cholesky factor: ``L_jj = sqrt(p_j q_j / q_{j-1})`` and
        ``L_ij = -p_i sqrt(p_j / (q_j q_{j-1}))``. Here q_j is the probability of class
        0 and of all classes beyond j.

        Source: Tanabe and Sagae (1992), "An exact Cholesky decomposition of the
        covariance matrix of a multinomial distribution".
        """
        contrasts = self.contrasts(predictions)
        p = precise(predictions).detach().softmax(-1)
        beyond = p[:, 1:].flip(1).cumsum(1).flip(1)  # classes from j on
        q = (p[:, :1] + F.pad(beyond[:, 1:], (0, 1))).clamp(min=1e-30)
        before = F.pad(q[:, :-1], (1, 0), value=1.0)
        p = p[:, 1:]
        diagonal = (p * q / before).sqrt() * contrasts
        # Column j of L below its diagonal is -p_i times one factor.
        below = (p * contrasts).flip(1).cumsum(1).flip(1) - p * contrasts
        return diagonal - (p / (q * before)).sqrt() * below

    def contrasts(self, predictions: Tensor) -> Tensor:
        """The differences of the logits from that of class 0, ``B x (C - 1)``.

        Raises:
            ValueError: If the logits are not ``B x C`` with at least two classes.
        """
        if predictions.dim() != 2 or predictions.shape[1] < 2:
            raise ValueError(
                f"logits have shape {tuple(predictions.shape)}; the linearized "
                f"predictive takes B x C, two classes or more: "
                f'predict(..., method="sample")'
            )
        logits = precise(predictions)
        return logits[:, 1:] - logits[:, :1]

    def from_contrasts(self, contrasts: Tensor) -> Tensor:
        """Logits, ``S x B x C``, with that of class 0 at 0."""
        return F.pad(contrasts, (1, 0))

    def summarize(self, predictions: Tensor) -> dict[str, Tensor]:
        """The fields of `CategoricalPrediction` from logits, ``S x B x C``."""
        samples = precise(predictions).softmax(-1)
        probs = samples.mean(0)
        entropy = torch.special.entr(probs).sum(-1)
        aleatoric = torch.special.entr(samples).sum(-1).mean(0)
        return {
            "probs": probs,
            "entropy": entropy,
            # equal samples leave a difference that rounding makes negative
            "mutual_information": (entropy - aleatoric).clamp(min=0),
            "samples": samples.transpose(0, 1),
        }

    def collect(self, fields: dict[str, Tensor]) -> CategoricalPrediction:
        """The prediction for all data from the fields of `summarize`."""
        return CategoricalPrediction(**samples_first(fields))
