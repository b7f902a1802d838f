"""The error of requests to a counter."""

from __future__ import annotations

from crowdexit.errors import CrowdExitError


class CounterError(CrowdExitError):
    """A request that a counter cannot serve."""
