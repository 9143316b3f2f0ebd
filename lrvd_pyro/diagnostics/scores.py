"""Scores of predicted class probabilities."""

import torch
from torch import Tensor

from lrvd_pyro.diagnostics.bootstrap import sum_of_first

__all__ = [
    "BINS",
    "calibration_bins",
    "check_probs",
    "per_datum",
    "risk_coverage",
    "scores",
]

BINS = 15


def scores(probs: Tensor, labels: Tensor, *, bins: int = BINS) -> dict[str, float]:
    """Accuracy, NLL, Brier score and ECE of a classifier.

    - ``accuracy``: the share of data whose most probable class is the label.
    - ``nll``: the mean of ``-log p(y)``, in nats per datum.
    - ``brier``: the mean of ``sum_c (p_c - 1[y = c])^2``, between 0 and 2.
    - ``ece``: the mean gap between confidence and accuracy over equally wide bins of
      confidence, weighted by their counts.

    Wrong for comparing ECE across data sets of different size or across bins: ECE is
    biased upwards on small data and depends on the bins.

    Args:
        probs: Class probabilities, ``n x C``, rows summing to one.
        labels: Class indices, ``n``.
        bins: The number of bins of the ECE.

    Returns:
        The four scores by name.

    Raises:
        ValueError: If there is more than one prediction per datum.
        ImportError: Without the ``metrics`` extra.

    Source: torchmetrics (ECE; Naeini, Cooper and Hauskrecht 2015).

    >>> scores(torch.eye(2), torch.tensor([0, 1]))["accuracy"]
    1.0
    """
    check_probs(probs)
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ImportError as error:
        raise ImportError(
            "scores need torchmetrics: pip install lrvd_pyro[metrics]"
        ) from error
    probs, labels = probs.detach().cpu().double(), labels.cpu()
    ece = multiclass_calibration_error(probs, labels, probs.shape[1], n_bins=bins)
    means = {name: float(x.mean()) for name, x in per_datum(probs, labels).items()}
    return means | {"ece": float(ece)}


def _check_flat(probs: Tensor) -> None:
    """Raise a ValueError unless there is one row of class probabilities per datum."""
    if probs.dim() != 2:
        raise ValueError(
            f"class probabilities have shape {tuple(probs.shape)}; expected n x C, one "
            f"prediction per datum. Of token labels give those that count, kept = "
            f"labels != -100: prediction[kept] (or its probs) and labels[kept]. "
            f"Intervals then take tokens for independent data"
        )


def check_probs(probs: Tensor) -> None:
    """Raise a ValueError unless the rows are probabilities of classes.

    NaN would count as a right prediction of class 0.
    """
    _check_flat(probs)
    sums = probs.detach().double().sum(1)
    if not (
        bool((probs >= 0).all()) and torch.allclose(sums, sums.new_ones(()), atol=1e-2)
    ):
        raise ValueError(
            f"class probabilities lie in {float(probs.min()):.3g} .. "
            f"{float(probs.max()):.3g} and add up to {float(sums.min()):.3g} .. "
            f"{float(sums.max()):.3g} in a row; expected numbers from 0 on that add up "
            f"to 1: logits.softmax(-1). NaN comes from a model or guide that is not "
            f"finite"
        )


def per_datum(probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The terms of the scores that are means over data, ``n`` each."""
    one_hot = torch.nn.functional.one_hot(labels.long(), probs.shape[1])
    # A label of probability 0 would make the mean over all data infinite.
    likelihood = probs.gather(1, labels.long()[:, None]).squeeze(1).clamp(min=1e-12)
    return {
        "accuracy": (probs.argmax(1) == labels).double(),
        "nll": -likelihood.log(),
        "brier": (probs - one_hot).square().sum(1),
    }


def calibration_bins(confidence: Tensor, bins: int = BINS) -> Tensor:
    """The number of the equally wide bin of each confidence, as in torchmetrics."""
    # torchmetrics makes its edges in single precision. Edges in double precision would
    # put a confidence close to one of them into another bin.
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float).double()
    return torch.bucketize(confidence, edges, right=True) - 1


def risk_coverage(
    confidence: Tensor, failed: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The error rate among the k most confident predictions, for k = 1 .. n.

    Predictions of equal confidence come in random order; this is the mean over orders.

    Args:
        confidence: ``n``.
        failed: 1 where the prediction is wrong, ``n``.
        weights: Counts, ``b x n``, each row a resample; None takes the data once.

    Returns:
        ``n``, or ``b x n`` with weights.

    >>> risk_coverage(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.0, 1.0, 0.0]))
    tensor([0.0000, 0.5000, 0.3333], dtype=torch.float64)
    """
    each = torch.ones(1, len(failed)) if weights is None else weights
    counts = torch.arange(1, len(failed) + 1, dtype=torch.double)
    risk = sum_of_first(each.double(), failed.double(), -confidence, counts) / counts
    return risk.squeeze(0) if weights is None else risk
