"""Scores of a posterior's predictions, pictures of them, and its export to ArviZ."""

from lrvd_pyro.diagnostics import calibration, plots
from lrvd_pyro.diagnostics.arviz import to_arviz
from lrvd_pyro.diagnostics.calibration import CalibrationReport, calibration_report

__all__ = [
    "CalibrationReport",
    "calibration",
    "calibration_report",
    "plots",
    "to_arviz",
]
