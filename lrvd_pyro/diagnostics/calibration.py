"""Calibration of a classifier: its scores and uncertainties, with intervals."""

import math
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrvd_pyro.diagnostics.bootstrap import Interval, auroc, resampled
from lrvd_pyro.diagnostics.calibration_gaps import GapSums, calibrated_errors, gap_sums
from lrvd_pyro.diagnostics.scores import (
    calibration_bins,
    check_probs,
    per_datum,
    risk_coverage,
    scores,
)
from lrvd_pyro.likelihoods.categorical import CategoricalPrediction

__all__ = [
    "CalibrationReport",
    "calibration_bins",
    "calibration_report",
    "risk_coverage",
    "scores",
]

_CHUNK = 1_000_000  # elements of a matrix of bootstrap weights


@dataclass(frozen=True)
class CalibrationReport:
    """How good a classifier's probabilities and uncertainties are.

    Attributes:
        num_data: The number of data n.
        accuracy: The share of data whose most probable class is the label.
        nll: The mean negative log probability of the label, in nats per datum.
        brier: The mean squared distance of probabilities and label, between 0 and 2.
        ece: The gap of confidence and accuracy over 15 equally wide bins of confidence.
        adaptive_ece: The same gap over 15 bins of n/15 data each. Data of one
            confidence are shared out evenly.
        failure_auroc: The probability that a right prediction is more confident than a
            wrong one. Ties count one half; NaN if all are right or all are wrong.
        aurc: The area under the risk-coverage curve: the mean over k = 1 .. n of the
            error rate among the k most confident predictions. It takes no trapezoids
            and does not subtract the best attainable area. Ties come in random order.
        entropy: The mean total uncertainty, in nats per datum.
        aleatoric: Its part within the draws of the posterior, in nats per datum.
        epistemic: Its part between the draws, the mutual information, in nats per
            datum.
        ood_entropy: The AUROC of entropy as a detector of out-of-distribution data;
            None without such data.
        ood_mutual_information: The AUROC of the mutual information, likewise.
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
        """Give the report as JSON: intervals as dicts, NaN as None."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: _finite(value) if isinstance(value, Interval) else value
            for name, value in values.items()
        }


def calibration_report(
    prediction: CategoricalPrediction,
    labels: Tensor,
    *,
    out_of_distribution: CategoricalPrediction | None = None,
    num_bootstrap: int = 1000,
    seed: int = 0,
) -> CalibrationReport:
    """Give scores and uncertainty measures of a classifier with bootstrap intervals.

    An interval goes from the 2.5% to the 97.5% quantile over resamples of the data.
    Data in and out of distribution are resampled separately. Resamples in which an
    AUROC is not defined do not count. The two ECEs are biased upwards, and more so in a
    resample. Their intervals are free of that bias (`GapSums.interval`): those of a
    calibrated classifier reach down to 0.

    Wrong as the whole uncertainty: an interval has the noise of this test set, but not
    that of training or of the posterior's draws.

    Example::

        prediction = predict(model, guide, test_batches)
        report = calibration_report(prediction, labels)
        report.nll.value, json.dumps(report.to_dict())

    Args:
        prediction: The prediction of `lrvd_pyro.predict` for n data.
        labels: Class indices, ``n``.
        out_of_distribution: The prediction for data that are not of these classes.
        num_bootstrap: The number of resamples.
        seed: The seed of the resamples.

    Returns:
        The report.

    Raises:
        TypeError: If a prediction is not a classifier's, or labels are not integers.
        ValueError: If there is not one prediction, or not one label in ``0 .. C - 1``,
            per datum; if a prediction has no data; or if ``num_bootstrap`` is below 1.
        ImportError: Without the ``metrics`` extra.

    Source: torchmetrics (ECE) and scikit-learn (AUROC) for the values; AURC, Geifman
    and El-Yaniv (2017, arXiv 1705.08500); adaptive bins, Nguyen and O'Connor (2015,
    arXiv 1508.05154); intervals of ECE, Carpenter (1999, J. R. Stat. Soc. B 61).
    """
    data = _Data.of(prediction, labels, out_of_distribution, num_bootstrap)
    everything = torch.ones(1, len(data.entropy), dtype=torch.double)
    values = {name: float(x) for name, x in _measure(data, everything).items()}
    for name, sums in _gaps(data, everything).items():
        values[name] = float(sums.errors())
    # Where torchmetrics or scikit-learn give a value, it is theirs. For the resamples
    # they would be too slow.
    values |= scores(data.probs, data.labels) | _aurocs(data)
    measures, gaps = _bootstrap(data, num_bootstrap, seed)
    tails = torch.tensor([0.025, 0.975], dtype=torch.double)
    intervals = {
        name: Interval(values[name], *map(float, x.nanquantile(tails)))
        for name, x in measures.items()
    }
    draws = torch.Generator().manual_seed(seed)
    null = calibrated_errors(data.probs.amax(1), num_bootstrap, draws)
    for name, sums in gaps.items():
        ends = sums.interval(values[name], null[name])
        intervals[name] = Interval(values[name], *ends)
    return CalibrationReport(num_data=len(labels), **intervals)


class _Data(NamedTuple):
    """The data of a report on the CPU, n of them, and m out of distribution.

    Attributes:
        probs: Of the n data, ``n x C``.
        labels: Of the n data, ``n``.
        entropy: Of all data, ``n + m``.
        mutual_information: Of all data, ``n + m``.
    """

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


def _measure(data: _Data, weights: Tensor) -> dict[str, Tensor]:
    """What has an interval of quantiles, ``b`` each, by ``b x (n + m)`` counts."""
    n, inside = len(data.labels), weights[:, : len(data.labels)]
    each = per_datum(data.probs, data.labels)
    confidence, hit = data.probs.amax(1), each["accuracy"]
    each |= {"entropy": data.entropy[:n], "epistemic": data.mutual_information[:n]}
    each["aleatoric"] = each["entropy"] - each["epistemic"]
    means = (inside @ torch.stack([*each.values()], 1) / n).unbind(1)
    measures = dict(zip(each, means))
    measures["aurc"] = risk_coverage(confidence, 1 - hit, inside).mean(1)
    measures["failure_auroc"] = auroc(inside, hit, confidence)
    if len(data.entropy) > n:
        outside = (torch.arange(len(data.entropy)) >= n).double()
        for name in ("entropy", "mutual_information"):
            measures[f"ood_{name}"] = auroc(weights, outside, getattr(data, name))
    return measures


def _gaps(data: _Data, weights: Tensor) -> dict[str, GapSums]:
    """What the two ECEs are sums of."""
    hit = (data.probs.argmax(1) == data.labels).double()
    return gap_sums(data.probs.amax(1), hit, weights[:, : len(data.labels)])


def _bootstrap(
    data: _Data, number: int, seed: int
) -> tuple[dict[str, Tensor], dict[str, GapSums]]:
    """Measures and gaps of a number of resamples, in chunks that fit into memory."""
    generator = torch.Generator().manual_seed(seed)
    n, total = len(data.labels), len(data.entropy)
    chunks: list[tuple[dict[str, Tensor], dict[str, GapSums]]] = []
    for part in torch.arange(number).split(max(1, _CHUNK // total)):
        sizes = [size for size in (n, total - n) if size]
        weights = torch.cat([resampled(len(part), k, generator) for k in sizes], 1)
        chunks.append((_measure(data, weights), _gaps(data, weights)))
    measured, gaps = zip(*chunks)
    return (
        {name: torch.cat([chunk[name] for chunk in measured]) for name in measured[0]},
        {name: GapSums.joined(chunk[name] for chunk in gaps) for name in gaps[0]},
    )


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
    areas = {"failure_auroc": float(area)}
    if len(data.entropy) > n:
        outside = torch.arange(len(data.entropy)) >= n
        for name in ("entropy", "mutual_information"):
            areas[f"ood_{name}"] = float(roc_auc_score(outside, getattr(data, name)))
    return areas


def _finite(interval: Interval) -> dict[str, float | None]:
    numbers = interval._asdict().items()
    return {name: x if math.isfinite(x) else None for name, x in numbers}


def _check(prediction: object, num_bootstrap: int) -> None:
    if not isinstance(prediction, CategoricalPrediction):
        raise TypeError(
            f"the prediction is a {type(prediction).__name__}; expected a "
            f"CategoricalPrediction: predict(model, guide, batches) of a classifier"
        )
    check_probs(prediction.probs)
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
