"""CrowdExit: how many people are in front of the camera, from image and audio, whenever the time is up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crowdexit.errors import CrowdExitError

if TYPE_CHECKING:
    from crowdexit.inference.anytime import DeadlineMissed
    from crowdexit.inference.counter import CrowdCounter, load
    from crowdexit.results import CountResult, ExitResult

__all__ = ["CountResult", "CrowdCounter", "CrowdExitError", "DeadlineMissed", "ExitResult", "load"]


def __getattr__(name: str) -> Any:
    """Load what counts only when it is asked for: ``crowdexit --help`` does not need torch."""
    if name in __all__:
        from crowdexit.inference import counter

        return getattr(counter, name)
    raise AttributeError(f"module 'crowdexit' has no attribute {name!r}")
