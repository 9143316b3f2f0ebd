"""Scores of predicted class probabilities, and how sure one may be of them."""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrvd_pyro.diagnostics.bootstrap import auroc, grouped, resampled, sum_of_first
from lrvd_pyro.likelihoods.categorical import CategoricalPrediction

BINS = 15
CHUNK = 1_000_000  # elements of a matrix of bootstrap weights


def scores(probs: Tensor, labels: Tensor, *, bins: int = BINS) -> dict[str, float]:
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
    ece = multiclass_calibration_error(probs, labels, probs.shape[1], n_bins=bins)
    means = {name: float(x.mean()) for name, x in _each(probs, labels).items()}
    return means | {"ece": float(ece)}


class Interval(NamedTuple):
    """A value and its 95% bootstrap interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class CalibrationReport:
    """How good a classifier's probabilities and uncertainties are.

    Attributes:
        num_data: The number of data n.
        accuracy: Share of data whose most probable class is the label.
        nll: Mean negative log probability of the label, nats per datum.
        brier: Mean squared distance of probabilities and label, between 0 and 2.
        ece: Gap of confidence and accuracy over 15 equally wide bins of confidence.
        adaptive_ece: The same over 15 bins of n/15 data each. Data of one confidence
            are shared out evenly.
        failure_auroc: Probability that a right prediction is more confident than a
            wrong one, ties counting one half; NaN if all are right or all wrong.
        aurc: Area under the risk-coverage curve, as the mean over k = 1 .. n of the
            error rate among the k most confident predictions. No trapezoids, and the
            best attainable area is not subtracted. Ties come in random order.
        entropy: Mean total uncertainty, nats per datum.
        aleatoric: Its part within the draws of the posterior, nats per datum.
        epistemic: Its part between them, the mutual information, nats per datum.
        ood_entropy: AUROC of entropy as a detector of out-of-distribution data; None
            without such data.
        ood_mutual_information: The same of the mutual information.
    """

    num_data: int
    accuracy: Interval
    nll: Interval
    brier: Interval
    ece: Interval
    adaptive_ece: Interval
    failure_auroc: Interval
    aurc: Interval
    entropy: Interval
    aleatoric: Interval
    epistemic: Interval
    ood_entropy: Interval | None = None
    ood_mutual_information: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: intervals as dicts, NaN as None."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: _finite(value) if isinstance(value, Interval) else value
            for name, value in found.items()
        }


def calibration_report(
    prediction: CategoricalPrediction,
    labels: Tensor,
    *,
    out_of_distribution: CategoricalPrediction | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> CalibrationReport:
    """Scores and uncertainty measures of a classifier, with bootstrap intervals.

    An interval is from the 2.5% to the 97.5% quantile over resamples of the data (in
    and out of distribution each by itself): the noise of this test set, and neither
    that of training nor of the posterior's draws. Resamples in which an AUROC is not
    defined do not count. ECE is biased upwards, and more so in a resample: for a well
    calibrated classifier its interval lies above its value.

    Example::

        prediction = predict(model, guide, test_batches)
        report = calibration_report(prediction, labels)
        report.nll.value, json.dumps(report.to_dict())

    Args:
        prediction: Of `lrvd_pyro.predict`, for n data.
        labels: ``n`` class indices.
        out_of_distribution: The prediction for data that are not of these classes.
        num_bootstrap: Resamples.
        seed: Of the resamples.

    Raises:
        TypeError: If a prediction is not a classifier's, or labels are not integers.
        ValueError: If there is not one label in ``0 .. C - 1`` per datum, a prediction
            has no data, or ``num_bootstrap`` is below 1.
        ImportError: Without the ``metrics`` extra.

    Source: torchmetrics (ECE) and scikit-learn (AUROC) for the values; AURC, Geifman
    and El-Yaniv (2017, arXiv 1705.08500); adaptive bins, Nguyen and O'Connor (2015,
    arXiv 1508.05154).
    """
    data = _Data.of(prediction, labels, out_of_distribution, num_bootstrap)
    everything = torch.ones(1, len(data.entropy), dtype=torch.double)
    values = {name: float(x) for name, x in _measure(data, everything).items()}
    values |= scores(data.probs, data.labels) | _aurocs(data)
    resampled = _bootstrap(data, num_bootstrap, seed)
    tails = torch.tensor([0.025, 0.975], dtype=torch.double)
    intervals = {
        name: Interval(values[name], *map(float, x.nanquantile(tails)))
        for name, x in resampled.items()
    }
    return CalibrationReport(num_data=len(labels), **intervals)


def calibration_bins(confidence: Tensor, bins: int = BINS) -> Tensor:
    """The number of the equally wide bin of each confidence, as torchmetrics has it."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float).double()
    return torch.bucketize(confidence, edges, right=True) - 1


def risk_coverage(
    confidence: Tensor, failed: Tensor, weights: Tensor | None = None
) -> Tensor:
    """The error rate among the k most confident predictions, k = 1 .. n, (n,).

    Predictions of equal confidence come in random order, of which this is the mean.

    Args:
        confidence: (n,).
        failed: (n,), 1 where the prediction is wrong.
        weights: ``b x n`` counts, each row a resample; gives ``b x n``.

    >>> risk_coverage(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.0, 1.0, 0.0]))
    tensor([0.0000, 0.5000, 0.3333], dtype=torch.float64)
    """
    each = torch.ones(1, len(failed)) if weights is None else weights
    counts = torch.arange(1, len(failed) + 1, dtype=torch.double)
    risk = sum_of_first(each.double(), failed.double(), -confidence, counts) / counts
    return risk.squeeze(0) if weights is None else risk


class _Data(NamedTuple):
    """On the CPU; the uncertainties of n data, then those of m out of distribution."""

    probs: Tensor
    labels: Tensor
    entropy: Tensor
    mutual_information: Tensor

    @classmethod
    def of(
        cls,
        prediction: CategoricalPrediction,
        labels: Tensor,
        outside: CategoricalPrediction | None,
        num_bootstrap: int,
    ) -> "_Data":
        parts = [prediction] if outside is None else [prediction, outside]
        for part in parts:
            _check(part, num_bootstrap)
        _check_labels(prediction.probs, labels)
        names = ("probs", "entropy", "mutual_information")
        fields = [[getattr(p, n).detach().cpu().double() for p in parts] for n in names]
        probs, entropy, information = fields
        return cls(probs[0], labels.cpu(), torch.cat(entropy), torch.cat(information))


def _each(probs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The scores that are means, for each datum."""
    one_hot = torch.nn.functional.one_hot(labels.long(), probs.shape[1])
    likelihood = probs.gather(1, labels.long()[:, None]).squeeze(1).clamp(min=1e-12)
    return {
        "accuracy": (probs.argmax(1) == labels).double(),
        "nll": -likelihood.log(),
        "brier": (probs - one_hot).square().sum(1),
    }


def _measure(data: _Data, weights: Tensor) -> dict[str, Tensor]:
    """Everything for b resamples, given as ``b x (n + m)`` counts; (b,) each."""
    n, inside = len(data.labels), weights[:, : len(data.labels)]
    each = _each(data.probs, data.labels)
    confidence, hit = data.probs.amax(1), each["accuracy"]
    each |= {"entropy": data.entropy[:n], "epistemic": data.mutual_information[:n]}
    each["aleatoric"] = each["entropy"] - each["epistemic"]
    found = dict(zip(each, (inside @ torch.stack([*each.values()], 1) / n).unbind(1)))
    gap, bins = confidence - hit, calibration_bins(confidence)
    found["ece"] = (grouped(inside * gap, bins, BINS + 1) / n).abs().sum(1)
    edges = torch.linspace(0, n, BINS + 1, dtype=torch.double)
    gaps = sum_of_first(inside, gap, confidence, edges).diff(dim=1)
    found["adaptive_ece"] = (gaps / n).abs().sum(1)
    found["aurc"] = risk_coverage(confidence, 1 - hit, inside).mean(1)
    found["failure_auroc"] = auroc(inside, hit, confidence)
    if len(data.entropy) > n:
        outside = (torch.arange(len(data.entropy)) >= n).double()
        for name in ("entropy", "mutual_information"):
            found[f"ood_{name}"] = auroc(weights, outside, getattr(data, name))
    return found


def _bootstrap(data: _Data, number: int, seed: int) -> dict[str, Tensor]:
    """`_measure` for as many resamples, in chunks that fit into memory."""
    generator = torch.Generator().manual_seed(seed)
    n, total = len(data.labels), len(data.entropy)
    chunks: list[dict[str, Tensor]] = []
    for part in torch.arange(number).split(max(1, CHUNK // total)):
        sizes = [size for size in (n, total - n) if size]
        weights = [resampled(len(part), size, generator) for size in sizes]
        chunks.append(_measure(data, torch.cat(weights, 1)))
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _aurocs(data: _Data) -> dict[str, float]:
    """The areas under ROC curves, by scikit-learn."""
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError(
            "calibration_report needs scikit-learn: pip install lrvd_pyro[metrics]"
        ) from error
    n, hit = len(data.labels), data.probs.argmax(1) == data.labels
    both = bool(hit.any() and not hit.all())
    area = roc_auc_score(hit, data.probs.amax(1)) if both else math.nan
    found = {"failure_auroc": float(area)}
    if len(data.entropy) > n:
        outside = torch.arange(len(data.entropy)) >= n
        for name in ("entropy", "mutual_information"):
            area = roc_auc_score(outside, getattr(data, name))
            found[f"ood_{name}"] = float(area)
    return found


def _finite(interval: Interval) -> dict[str, float | None]:
    found = interval._asdict().items()
    return {name: x if math.isfinite(x) else None for name, x in found}


def _check(prediction: Any, num_bootstrap: int) -> None:
    if not isinstance(prediction, CategoricalPrediction):
        raise TypeError(
            f"the prediction is a {type(prediction).__name__}; expected a "
            f"CategoricalPrediction: predict(model, guide, batches) of a classifier"
        )
    if len(prediction.probs) < 1 or num_bootstrap < 1:
        raise ValueError(
            f"got a prediction for {len(prediction.probs)} data and "
            f"num_bootstrap={num_bootstrap}; expected at least one of each"
        )


def _check_labels(probs: Tensor, labels: Tensor) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(
            f"labels have dtype {labels.dtype}; expected integers, one class index "
            f"per datum: labels.long()"
        )
    n, classes = probs.shape
    if labels.shape != (n,) or labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not match {n} predictions of "
            f"{classes} classes; expected one label in 0 .. {classes - 1} per datum, "
            f"in the order of the batches predicted"
        )
