"""Scores of predicted class probabilities."""

import torch
from torch import Tensor


def scores(probs: Tensor, labels: Tensor, *, bins: int = 15) -> dict[str, float]:
    """Accuracy, NLL, Brier score and ECE of a classifier.

    NLL is the mean negative log probability of the label, in nats per datum; Brier the
    mean squared distance ``sum_c (p_c - 1[y = c])^2``, between 0 and 2; ECE the mean
    gap between confidence and accuracy over equally wide bins of confidence, weighted
    by their counts. ECE is biased upwards on small data and depends on the bins.

    Args:
        probs: ``n x C``, rows summing to one.
        labels: ``n`` class indices.
        bins: For ECE.

    Raises:
        ImportError: Without the ``metrics`` extra.

    Source: torchmetrics (ECE; Naeini, Cooper and Hauskrecht 2015).

    >>> scores(torch.eye(2), torch.tensor([0, 1]))["accuracy"]
    1.0
    """
    try:
        from torchmetrics.functional.classification import multiclass_calibration_error
    except ImportError as error:
        raise ImportError(
            "scores need torchmetrics: pip install lrvd_pyro[metrics]"
        ) from error
    probs, labels = probs.detach().cpu().double(), labels.cpu()
    likelihood = probs.gather(1, labels[:, None]).clamp(min=1e-12)
    hit = torch.nn.functional.one_hot(labels, probs.shape[1])
    ece = multiclass_calibration_error(probs, labels, probs.shape[1], n_bins=bins)
    return {
        "accuracy": float((probs.argmax(1) == labels).double().mean()),
        "nll": float(-likelihood.log().mean()),
        "brier": float((probs - hit).square().sum(1).mean()),
        "ece": float(ece),
    }
