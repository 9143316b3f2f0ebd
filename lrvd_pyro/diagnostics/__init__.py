"""Scores of a posterior's predictions, pictures of them, and its export to ArviZ."""

from lrvd_pyro.diagnostics import calibration, plots
from lrvd_pyro.diagnostics.arviz import to_arviz
from lrvd_pyro.diagnostics.calibration import CalibrationReport, calibration_report
from lrvd_pyro.diagnostics.temperature import fit_temperature

__all__ = [
    "CalibrationReport",
    "calibration",
    "calibration_report",
    "fit_temperature",
    "plots",
    "to_arviz",
]
