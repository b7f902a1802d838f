"""Images from outside, read with bounds. What a network sees of them is in :mod:`crowdexit.data.views`."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.images.header import ImageHeader, read_header
from crowdexit.data.images.limits import MAX_PIXELS, MIN_SIDE, ImageError
from crowdexit.data.images.reader import FORMATS, SUFFIXES, DecodedImage, SizeCheck, decode_image, from_pil, read_image

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "MIN_SIDE",
    "SUFFIXES",
    "DecodedImage",
    "ImageError",
    "ImageHeader",
    "decode_image",
    "decode_pixels",
    "from_pil",
    "read_header",
    "read_image",
    "read_pixels",
]

log = logging.getLogger(__name__)


def decode_pixels(data: bytes, name: str = "image") -> NDArray[np.uint8]:
    """The pixels of :func:`decode_image` alone; its warnings go to the log."""
    return _logged(decode_image(data, name), name)


def read_pixels(path: str | Path, check: SizeCheck | None = None) -> NDArray[np.uint8]:
    """The pixels of :func:`read_image` alone; its warnings go to the log."""
    return _logged(read_image(path, check), str(path))


def _logged(image: DecodedImage, name: str) -> NDArray[np.uint8]:
    for warning in image.warnings:
        log.warning("%s: %s", name, warning)
    return image.pixels
