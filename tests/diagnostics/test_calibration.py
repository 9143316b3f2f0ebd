"""Scores against values computed by hand, and against other libraries."""

import json
import math
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from lrvd_pyro.diagnostics.calibration import calibration_report, risk_coverage, scores
from lrvd_pyro.diagnostics.scores import calibration_bins
from lrvd_pyro.likelihoods.categorical import Categorical, CategoricalPrediction
from lrvd_pyro.likelihoods.normal import NormalPrediction

CLASSES = 4


def test_scores_of_two_predictions_by_hand() -> None:
    probs = torch.tensor([[0.8, 0.2], [0.4, 0.6]])
    found = scores(probs, torch.tensor([0, 0]))
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert found["brier"] == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2)
    assert found["ece"] == pytest.approx((0.2 + 0.6) / 2)


def test_without_torchmetrics_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ImportError, match=r"pip install lrvd_pyro\[metrics\]"):
        scores(torch.eye(2), torch.tensor([0, 1]))


def test_without_scikit_learn_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"needs scikit-learn: pip install lrvd_pyro"):
        calibration_report(predicted(9), torch.zeros(9, dtype=torch.long))


def predicted(n: int, spread: float = 1.0) -> CategoricalPrediction:
    """Eight draws of logits around random ones."""
    logits = 2 * torch.randn(n, CLASSES) + spread * torch.randn(8, n, CLASSES)
    likelihood = Categorical()
    return likelihood.collect(likelihood.summarize(logits))


def drawn(prediction: CategoricalPrediction) -> Tensor:
    """Labels for which the probabilities are right."""
    return torch.distributions.Categorical(prediction.probs).sample()


def plain_aurc(confidence: Any, hit: Any) -> float:
    errors = (~hit)[np.argsort(-confidence)]
    return float((errors.cumsum() / np.arange(1, len(hit) + 1)).mean())


def plain_adaptive_ece(confidence: Any, hit: Any) -> float:
    """For n that 15 divides."""
    bins = np.argsort(confidence).reshape(15, -1)
    gaps = confidence[bins].mean(1) - hit[bins].mean(1)
    return float(np.abs(gaps).mean())


def naive(
    p: CategoricalPrediction, y: Tensor, out: CategoricalPrediction
) -> dict[str, float]:
    """Every number by numpy, torchmetrics and scikit-learn."""
    probs, hit = p.probs.numpy(), (p.probs.argmax(1) == y).numpy()
    confidence = probs.max(1)
    unknown = np.r_[np.zeros(len(hit)), np.ones(len(out.entropy))]
    found = {
        "accuracy": hit.mean(),
        "nll": log_loss(y, probs, labels=range(CLASSES)),
        "brier": ((probs - np.eye(CLASSES)[y]) ** 2).sum(1).mean(),
        "ece": scores(p.probs, y)["ece"],
        "adaptive_ece": plain_adaptive_ece(confidence, hit),
        "failure_auroc": roc_auc_score(hit, confidence),
        "aurc": plain_aurc(confidence, hit),
        "entropy": p.entropy.mean(),
        "epistemic": p.mutual_information.mean(),
        "aleatoric": (p.entropy - p.mutual_information).mean(),
    }
    for name in ("entropy", "mutual_information"):
        signal = torch.cat([getattr(p, name), getattr(out, name)])
        found[f"ood_{name}"] = roc_auc_score(unknown, signal)
    return {name: float(value) for name, value in found.items()}


def at(p: CategoricalPrediction, rows: Tensor) -> CategoricalPrediction:
    return CategoricalPrediction(
        p.probs[rows], p.entropy[rows], p.mutual_information[rows]
    )


def test_every_value_is_what_plain_code_says() -> None:
    p, out = predicted(150), predicted(90, spread=2.0)
    y = drawn(p)
    report = calibration_report(p, y, out_of_distribution=out, num_bootstrap=3)
    for name, value in naive(p, y, out).items():
        assert getattr(report, name).value == pytest.approx(value), name
    assert report.num_data == 150


def with_ties(p: CategoricalPrediction) -> CategoricalPrediction:
    """The entropies rounded, to 0 or 1."""
    return CategoricalPrediction(p.probs, p.entropy.round(), p.mutual_information)


ECES = ("ece", "adaptive_ece")  # their intervals: test_calibration_gaps.py


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    p, out = with_ties(predicted(150)), with_ties(predicted(90, spread=2.0))
    y = drawn(p)
    report = calibration_report(p, y, out_of_distribution=out, num_bootstrap=2000)
    resampled = []
    for _ in range(400):
        i, j = torch.randint(150, (150,)), torch.randint(90, (90,))
        resampled.append([*naive(at(p, i), y[i], at(out, j)).values()])
    tails = np.quantile(resampled, [0.025, 0.975], axis=0)
    sd = np.std(resampled, axis=0)
    for k, name in enumerate(naive(p, y, out)):
        if name in ECES:
            continue
        interval = getattr(report, name)
        ours = np.array([interval.low, interval.high])
        assert np.abs(ours - tails[:, k]).max() < 0.5 * sd[k], name
        # the twin: half the data would give wider intervals
        assert abs(ours[1] - ours[0]) < 1.25 * (tails[1, k] - tails[0, k]), name


def test_three_predictions_by_hand() -> None:
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3]])
    p = CategoricalPrediction(probs, torch.zeros(3), torch.zeros(3))
    report = calibration_report(p, torch.tensor([0, 1, 0]))
    assert report.aurc.value == pytest.approx((0 + 1 / 2 + 1 / 3) / 3)
    assert report.failure_auroc.value == pytest.approx(0.5)


def test_ties_of_confidence_come_in_random_order() -> None:
    confidence = torch.tensor([0.5, 0.9, 0.5, 0.9, 0.5])
    failed = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0])
    orders = []
    for _ in range(4000):
        mixed = torch.randperm(5)
        place = mixed[(-confidence[mixed]).argsort(stable=True)]
        orders.append(failed[place].cumsum(0) / torch.arange(1, 6))
    risk = risk_coverage(confidence, failed)
    torch.testing.assert_close(risk, torch.stack(orders).mean(0), rtol=0, atol=0.03)
    again = risk_coverage(confidence.flip(0), failed.flip(0))
    torch.testing.assert_close(risk, again)


def test_good_uncertainty_scores_better_than_bad() -> None:
    p, shuffled = predicted(4000), torch.randperm(4000)
    y = drawn(p)
    report = calibration_report(p, y, num_bootstrap=200)
    sharp = CategoricalPrediction(
        (p.probs.log() * 3).softmax(1), p.entropy, p.mutual_information
    )
    wrong = calibration_report(sharp, y, num_bootstrap=200)
    assert report.ece.value < 0.06 < wrong.ece.low
    assert report.adaptive_ece.value < 0.06 < wrong.adaptive_ece.low
    assert report.nll.high < wrong.nll.value
    lost = calibration_report(p, y[shuffled], num_bootstrap=200)
    assert report.failure_auroc.low > 0.6 > lost.failure_auroc.value
    assert report.aurc.high < lost.aurc.low


def of_two_classes(first: Tensor) -> CategoricalPrediction:
    """Probabilities of the first of two classes."""
    none = torch.zeros(len(first))
    return CategoricalPrediction(torch.stack([first, 1 - first], 1), none, none)


def test_a_label_of_probability_0_costs_a_finite_nll() -> None:
    p, y = of_two_classes(torch.tensor([1.0, 0.5])), torch.tensor([1, 0])
    worst = -math.log(1e-12)
    expected = (worst + math.log(2)) / 2
    assert scores(p.probs, y)["nll"] == pytest.approx(expected)
    report = calibration_report(p, y, num_bootstrap=200)
    assert report.nll.value == pytest.approx(expected)
    assert report.nll.high == pytest.approx(worst)


def test_confidences_of_1_have_a_bin_of_their_own_in_the_interval_too() -> None:
    """As in torchmetrics; in one bin with those of .95 the gaps would cancel."""
    sure = torch.arange(4000) < 2000
    p = of_two_classes(torch.where(sure, 1.0, 0.95).double())
    report = calibration_report(p, sure.long(), num_bootstrap=200)
    assert report.ece.value == pytest.approx((1 + 0.05) / 2, rel=1e-4)
    assert report.ece.low < report.ece.value < report.ece.high
    assert report.ece.low > (1 - 0.05) / 2  # the twin: one bin for both


def test_confidences_at_an_edge_lie_in_the_bin_of_torchmetrics() -> None:
    """Its edges are of single precision; the twin is off by one in double."""
    edges, at = torch.linspace(0, 1, 16, dtype=torch.float).double(), torch.arange(16)
    assert torch.equal(calibration_bins(edges), at)
    assert torch.equal(calibration_bins((edges - 1e-10)[1:]), at[:-1])
    double = torch.bucketize(edges, torch.linspace(0, 1, 16), right=True) - 1
    assert not torch.equal(double, at)


@pytest.mark.parametrize("right", [True, False])
def test_without_both_failures_and_successes_the_auroc_is_not_defined(
    right: bool,
) -> None:
    p = predicted(40)
    y = p.probs.argmax(1) if right else p.probs.argmin(1)
    report = calibration_report(p, y, num_bootstrap=20)
    assert all(math.isnan(x) for x in report.failure_auroc)
    assert report.aurc == (0, 0, 0) if right else report.aurc == (1, 1, 1)
    saved = report.to_dict()["failure_auroc"]
    assert saved == {"value": None, "low": None, "high": None}


def test_resamples_without_a_failure_do_not_count() -> None:
    p = predicted(40)
    y = p.probs.argmax(1)
    y[0] = (y[0] + 1) % CLASSES  # a third of the resamples lack it
    report = calibration_report(p, y, num_bootstrap=200)
    assert all(math.isfinite(x) for x in report.failure_auroc)


def test_a_report_is_json_and_repeats_itself() -> None:
    p, out = predicted(60), predicted(30)
    y = drawn(p)
    report = calibration_report(p, y, out_of_distribution=out, seed=3)
    saved = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert saved["num_data"] == 60 and saved["nll"]["low"] == report.nll.low
    assert report == calibration_report(p, y, out_of_distribution=out, seed=3)
    assert report != calibration_report(p, y, out_of_distribution=out, seed=4)
    assert calibration_report(p, y, num_bootstrap=2).to_dict()["ood_entropy"] is None


def test_chunks_do_not_change_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    p = predicted(60)
    y = drawn(p)
    whole = calibration_report(p, y, num_bootstrap=50)
    monkeypatch.setattr("lrvd_pyro.diagnostics.calibration._CHUNK", 60 * 7)
    parts = calibration_report(p, y, num_bootstrap=50)
    assert parts.nll == pytest.approx(whole.nll)
    assert parts.aurc == pytest.approx(whole.aurc)


def test_a_thousand_resamples_of_a_thousand_data_take_under_two_seconds() -> None:
    p, out = predicted(1000), predicted(1000)
    y = drawn(p)
    calibration_report(p, y, out_of_distribution=out, num_bootstrap=1)  # imports
    began = time.process_time()
    calibration_report(p, y, out_of_distribution=out)
    assert time.process_time() - began < 2


def test_what_cannot_be_scored_is_refused() -> None:
    p, y = predicted(6), torch.zeros(6, dtype=torch.long)
    for bad in (y[:5], y - 1, y + CLASSES, y[:, None]):
        with pytest.raises(
            ValueError, match=r"do not match 6 predictions of 4 classes"
        ):
            calibration_report(p, bad)
    for floating in (y.double(), y.bool()):
        with pytest.raises(TypeError, match=r"expected integers, one class index"):
            calibration_report(p, floating)
    normal: Any = NormalPrediction(*[torch.ones(6)] * 4)
    with pytest.raises(TypeError, match=r"prediction is a NormalPrediction; expected"):
        calibration_report(normal, y)
    with pytest.raises(TypeError, match=r"prediction is a NormalPrediction; expected"):
        calibration_report(p, y, out_of_distribution=normal)
    with pytest.raises(ValueError, match=r"for 6 data and num_bootstrap=0; expected"):
        calibration_report(p, y, num_bootstrap=0)
    with pytest.raises(ValueError, match=r"got a prediction for 0 data"):
        calibration_report(p, y, out_of_distribution=predicted(0))
