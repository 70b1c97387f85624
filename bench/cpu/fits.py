"""Straight lines through measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """y = slope * x + intercept.

    Args:
        r2: how much of y's variance the line explains.
        worst: the most that a point is off the line, as a fraction of the point.
    """

    slope: float
    intercept: float
    r2: float
    worst: float


def linear_fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The line of least squares."""
    slope, intercept = np.polyfit(x, y, 1)
    residual = np.asarray(y) - (slope * np.asarray(x) + intercept)
    r2 = 1 - residual.var() / np.var(y)
    worst = np.max(np.abs(residual) / np.abs(y))
    return Fit(float(slope), float(intercept), float(r2), float(worst))
