"""Makes HDR signals of SDR images, by the formulas of the standards."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LUMA = np.array([0.2627, 0.6780, 0.0593])  # of BT.2020
_TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


def linear(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Light of an sRGB image, from 0 to 1."""
    x = image / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encode_hdr(image: NDArray[np.uint8], transfer: str, white: float) -> NDArray[np.uint16]:
    """An sRGB image as R'G'B' of BT.2020 in 16 bits, its white at so many cd/m²."""
    light = linear(image) @ _TO_BT2020.T * white
    if transfer == "pq":
        power = np.clip(light / 10_000, 0, 1) ** (2610 / 16384)
        signal = ((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)
    else:
        shown = light / 1000  # of a display of 1000 cd/m²
        scene = shown * np.maximum(shown @ LUMA, 1e-9)[..., None] ** (1 / 1.2 - 1)
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        with np.errstate(invalid="ignore", divide="ignore"):
            signal = np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(12 * scene - b) + c)
    return np.round(np.clip(signal, 0, 1) * 65535).astype(np.uint16)
