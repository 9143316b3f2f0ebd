"""Intervals of the calibration errors, against populations whose error is known."""

import pytest
import torch
from torch import Tensor

from lrvd_pyro.diagnostics.bootstrap import grouped, resampled
from lrvd_pyro.diagnostics.calibration import calibration_report
from lrvd_pyro.diagnostics.calibration_gaps import GapSums, calibrated_errors, gap_sums
from lrvd_pyro.diagnostics.scores import BINS, calibration_bins, scores
from lrvd_pyro.likelihoods.categorical import CategoricalPrediction

TEST_SETS, SIZE, RESAMPLES = 100, 400, 200
TAILS = torch.tensor([0.025, 0.975], dtype=torch.double)


def confidences(n: int) -> Tensor:
    """Those of two classes, from one half to 1."""
    return 0.5 + 0.5 * torch.rand(n, dtype=torch.double).sqrt()


def right(confidence: Tensor, excess: float) -> Tensor:
    """Hits of a classifier whose confidence is too high by ``excess``."""
    chance = (confidence - excess).clamp(min=0.0)
    return (torch.rand(len(confidence), dtype=torch.double) < chance).double()


Drawn = tuple[dict[str, float], dict[str, GapSums], dict[str, Tensor]]


def drawn_sums(excess: float) -> Drawn:
    """The errors of one test set, their resamples, and those of a calibrated one."""
    confidence = confidences(SIZE)
    hit = right(confidence, excess)
    once = gap_sums(confidence, hit, torch.ones(1, SIZE, dtype=torch.double))
    weights = resampled(RESAMPLES, SIZE, torch.Generator().manual_seed(0))
    values = {name: float(sums.errors()) for name, sums in once.items()}
    null = calibrated_errors(confidence, RESAMPLES, torch.Generator().manual_seed(1))
    return values, gap_sums(confidence, hit, weights), null


@pytest.mark.parametrize("excess", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("name", ["ece", "adaptive_ece"])
def test_the_interval_holds_the_populations_error_and_quantiles_do_not(
    name: str, excess: float
) -> None:
    """A constant excess is the error in either kind of bins, since no gap cancels."""
    held, held_by_quantiles = 0, 0
    for _ in range(TEST_SETS):
        values, sums, null = drawn_sums(excess)
        low, high = sums[name].interval(values[name], null[name])
        assert 0 <= low <= values[name] <= high <= 1
        held += low <= excess <= high
        low, high = sums[name].errors().quantile(TAILS).tolist()
        held_by_quantiles += low <= excess <= high
    # 95 of 100 are due. Fewer than 85 have a probability of 1e-5 at a coverage of 94%.
    assert held >= 85
    # The twin. Its bias is noise: it is lost in an error far above the noise.
    assert held_by_quantiles <= (60 if excess < 0.1 else 100)


def test_the_interval_shrinks_as_the_data_grow_and_leaves_0_behind() -> None:
    confidence = confidences(20_000)
    none = torch.zeros(len(confidence))
    probs = torch.stack([confidence, 1 - confidence], 1)
    labels = 1 - right(confidence, 0.05).long()
    few, many = (
        calibration_report(
            CategoricalPrediction(probs[:n], none[:n], none[:n]), labels[:n]
        ).ece
        for n in (500, 20_000)
    )
    assert many.high - many.low < 0.3 * (few.high - few.low)
    assert 0.03 < many.low < 0.05 < many.high < 0.07


def test_without_a_share_the_gaps_of_the_data_vanish() -> None:
    confidence = confidences(SIZE).mul(20).round().div(20)  # ties
    hit = right(confidence, 0.1)
    once = torch.ones(1, SIZE, dtype=torch.double)
    sums = gap_sums(confidence, hit, once)
    assert sums["ece"].errors(0.0) == pytest.approx(0, abs=1e-12)
    # Ties lie in two bins at a time, which share their mean.
    assert sums["adaptive_ece"].errors(0.0) < 0.3 * sums["adaptive_ece"].errors()
    bins = calibration_bins(confidence)
    plain = (grouped(once * (confidence - hit), bins, BINS + 1) / SIZE).abs().sum()
    assert float(sums["ece"].errors()) == pytest.approx(float(plain))


def test_an_error_of_0_has_no_interval_around_it() -> None:
    hit = torch.tensor([1.0, 1.0, 0.0, 0.0]).double()
    weights = resampled(50, 4, torch.Generator().manual_seed(0))
    for sums in gap_sums(hit, hit, weights).values():
        assert sums.interval(0.0, torch.zeros(50)) == (0.0, 0.0)


@pytest.mark.parametrize(("doubt", "n"), [(0.02, 100), (0.004, 500)])
def test_a_confident_classifier_that_is_calibrated_has_0_in_its_interval(
    doubt: float, n: int
) -> None:
    """Most such sets have no error at all, and no noise to resample."""
    with_0 = degenerate = 0
    for _ in range(40):
        confidence = 1 - doubt * torch.rand(n, dtype=torch.double)
        probs = torch.stack([confidence, 1 - confidence], 1)
        labels = (torch.rand(n) > confidence).long()
        nothing = torch.zeros(n)
        prediction = CategoricalPrediction(probs, nothing, nothing)
        ece = calibration_report(prediction, labels, num_bootstrap=100).ece
        with_0 += ece.low == 0
        weights = resampled(100, n, torch.Generator().manual_seed(0))
        hit = 1.0 - labels.double()
        alone = gap_sums(confidence, hit, weights)["ece"]
        degenerate += alone.interval(ece.value, torch.zeros(100))[0] > 0
    assert with_0 >= 36
    assert degenerate >= 8  # the twin: resamples of the data alone


@pytest.mark.parametrize("probs", [[[0.5, float("nan")]], [[0.9, 0.6]], [[1.2, -0.2]]])
def test_what_is_no_probability_has_no_scores(probs: list[list[float]]) -> None:
    rows, labels = torch.tensor(probs), torch.tensor([0])
    message = "class probabilities lie in .* expected numbers from 0 on that add up to"
    with pytest.raises(ValueError, match=message):
        scores(rows, labels)
    prediction = CategoricalPrediction(rows, torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=message):
        calibration_report(prediction, labels)
