"""Pictures of ranks and of calibration: one function a picture.

Each function draws on the matplotlib axes ``ax``, or on new ones, and returns them::

    ax = plots.rank_heatmap(history, by="layer")
    ax.figure.savefig("ranks.png", dpi=150)

A new picture goes into `rank_plots` or `calibration_plots`, and its name here.
"""

from lrvd_pyro.diagnostics.calibration_plots import (
    reliability_diagram,
    risk_coverage_curve,
)
from lrvd_pyro.diagnostics.rank_plots import (
    effective_rank,
    energy_curves,
    gate_forest,
    rank_heatmap,
    threshold_sweep,
)

__all__ = [
    "effective_rank",
    "energy_curves",
    "gate_forest",
    "rank_heatmap",
    "reliability_diagram",
    "risk_coverage_curve",
    "threshold_sweep",
]
