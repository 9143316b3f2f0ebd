"""How good a posterior's predictions are: scores, pictures, and ArviZ."""

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
