"""Scores against values computed by hand."""

import math
import sys

import pytest
import torch

from lrvd_pyro.calibration import scores


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
