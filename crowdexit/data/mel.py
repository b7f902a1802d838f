"""The form of what a network hears. Making it needs PyTorch (:mod:`crowdexit.data.log_mel`); taking it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError

FRAMES, MEL_BANDS = 96, 64


class AudioError(CrowdExitError):
    """Sound that cannot be read or is no sound."""


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
