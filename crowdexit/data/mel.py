"""The form of what a network hears. Making it needs PyTorch (:mod:`crowdexit.data.log_mel`); taking it does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError

FRAMES, MEL_BANDS = 96, 64


# Whether a count was made with audio, or why not: see docs/inputs.md.
AudioStatus = Literal["used", "none", "unreadable", "tiled", "switched off"]


class AudioError(CrowdExitError):
    """Sound that cannot be read or is no audio."""


@dataclass(frozen=True)
class AudioInput:
    """The audio that a network is given.

    Attributes:
        log_mel: (96, 64) float32, or None: there is none.
        missing: why there is none.
        warnings: what its reader had to say, one line each.
    """

    log_mel: NDArray[np.float32] | None
    missing: Literal["none", "unreadable", "switched off"] = "none"
    warnings: tuple[str, ...] = ()


def checked_log_mel(given: Any) -> NDArray[np.float32]:
    """A log-mel (96, 64) that somebody has made, as float32.

    Raises:
        AudioError: if it is not one, or not finite.
    """
    if not isinstance(given, np.ndarray) or given.shape != (FRAMES, MEL_BANDS) or given.dtype.kind not in "fiu":
        raise AudioError(f"a log-mel is an array ({FRAMES}, {MEL_BANDS}) of numbers")
    with np.errstate(over="ignore"):
        mel: NDArray[np.float32] = given.astype(np.float32)
    if not np.isfinite(mel).all():
        raise AudioError(f"a log-mel ({FRAMES}, {MEL_BANDS}) has finite values")
    return mel
