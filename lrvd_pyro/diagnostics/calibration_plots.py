"""Pictures of calibration: reliability, and the risk-coverage curve."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lrvd_pyro.diagnostics._axes import axes_or_new, with_legend
from lrvd_pyro.diagnostics.scores import (
    BINS,
    calibration_bins,
    check_probs,
    risk_coverage,
)
from lrvd_pyro.likelihoods.categorical import CategoricalPrediction

__all__ = ["reliability_diagram", "risk_coverage_curve"]

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def reliability_diagram(
    prediction: CategoricalPrediction,
    labels: Tensor,
    *,
    bins: int = BINS,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw accuracy against confidence in equally wide bins, with their share of data.

    Bars below the diagonal are over-confident. ECE is the mean distance of the points
    from the diagonal, weighted by the shares.

    Args:
        prediction: The prediction of `lrvd_pyro.predict` for n data.
        labels: Class indices, ``n``.
        bins: The number of bins.
        ax: Where to draw; None makes new axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there is not one label per prediction.
    """
    confidence, hit = _confidence_and_hit(prediction, labels)
    # A confidence of exactly 1 lies beyond the last edge.
    index = calibration_bins(confidence, bins).clamp(max=bins - 1)
    count = index.bincount(minlength=bins)
    share = (count / count.sum()).numpy()
    height = (index.bincount(hit, minlength=bins) / count).numpy()
    mean = (index.bincount(confidence, minlength=bins) / count).numpy()
    left = [i / bins for i in range(bins)]
    ax = axes_or_new(ax, width=4.2, height=4.2)
    ax.plot([0, 1], [0, 1], "--", color="gray", lw=1, label="calibrated")
    ax.bar(left, height, 1 / bins, align="edge", alpha=0.5, label="accuracy")
    ax.plot(mean, height, "o", ms=4, color="C0", label="at mean confidence")
    ax.stairs(share, [*left, 1.0], color="black", lw=1, label="share of data")
    ax.set(xlabel="confidence (largest probability)", ylabel="accuracy, share of data")
    ax.set(xlim=(0, 1), ylim=(0, 1), title="Reliability")
    ax.legend(loc="upper left", frameon=False, fontsize=8)
    return ax


def risk_coverage_curve(
    prediction: CategoricalPrediction,
    labels: Tensor,
    *,
    label: str | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the error rate among the most confident predictions, against their share.

    The curve's mean height is the AURC of `calibration_report`; the legend shows it.

    Args:
        prediction: The prediction of `lrvd_pyro.predict` for n data.
        labels: Class indices, ``n``.
        label: The curve's name in the legend.
        ax: Where to draw; None makes new axes.

    Returns:
        The axes.

    Raises:
        ValueError: If there is not one label per prediction.
    """
    confidence, hit = _confidence_and_hit(prediction, labels)
    risk = risk_coverage(confidence, 1 - hit)
    coverage = (torch.arange(1, len(risk) + 1) / len(risk)).numpy()
    ax = axes_or_new(ax)
    name = f"{label}, " if label else ""
    ax.plot(coverage, risk.numpy(), label=f"{name}AURC {float(risk.mean()):.3f}")
    ax.set(xlabel="coverage (share of data predicted)", ylabel="risk (error rate)")
    ax.set(xlim=(0, 1), ylim=(0, None), title="Risk and coverage")
    return with_legend(ax, "AURC")


def _confidence_and_hit(
    prediction: CategoricalPrediction, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The largest probability of each datum, and 1 where its class is the label."""
    check_probs(prediction.probs)
    probs = prediction.probs.detach().cpu().double()
    if labels.shape != probs.shape[:1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} do not match {len(probs)} "
            f"predictions; expected one label each, in their order"
        )
    return probs.amax(1), (probs.argmax(1) == labels.cpu()).double()
