"""OpenCV's decoders, quietly: they tell of damage by what they return."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def imdecode(data: bytes, flags: int = cv2.IMREAD_UNCHANGED, quiet: bool = True) -> NDArray[Any] | None:
    """An image as OpenCV decodes it, by default in its own samples, BGR; None where it cannot.

    Args:
        quiet: without OpenCV's warnings on the standard error.

    Raises:
        cv2.error: for what it does not even begin with.
    """
    logging = cv2.utils.logging
    level = logging.setLogLevel(logging.LOG_LEVEL_SILENT if quiet else logging.LOG_LEVEL_WARNING)
    try:
        return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    finally:
        logging.setLogLevel(level)
