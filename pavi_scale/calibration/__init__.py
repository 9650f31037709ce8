"""Calibration: ranks of truths among posterior draws, their tests, and simulation-based calibration of a model and its fits."""

from pavi_scale.calibration.result import SBC
from pavi_scale.calibration.simulated import sbc

__all__ = ["SBC", "sbc"]
