"""Smooth counts over frames."""

from __future__ import annotations

import math

from crowdexit.errors import CrowdExitError

HALF_LIFE_S = 2.0


class SmoothError(CrowdExitError):
    """An invalid half-life."""


class Smoother:
    """Exponentially weighted mean of the counts so far, for any spacing of the frames.

    Args:
        half_life: in seconds; 0: no smoothing.

    Raises:
        SmoothError: for an invalid half-life.
    """

    def __init__(self, half_life: float = HALF_LIFE_S) -> None:
        if not (math.isfinite(half_life) and half_life >= 0):
            raise SmoothError(f"counts cannot be smoothed with a half-life of {half_life:g} s")
        self.half_life = half_life
        self._time = self._sum = self._weight = 0.0

    def add(self, time_s: float, count: float) -> float:
        """Add a count, whose time is not before the last one, and return the mean."""
        kept = 0.5 ** (max(0.0, time_s - self._time) / self.half_life) if self.half_life else 0.0
        self._time = time_s
        self._sum = kept * self._sum + count
        self._weight = kept * self._weight + 1.0
        return self._sum / self._weight
