"""High dynamic range to 8-bit sRGB: the tone mapping of PQ and HLG video.

1. The signal becomes light. PQ (SMPTE ST 2084) states it in cd/m². HLG (ARIB STD-B67) is shown as on a display of
   1000 cd/m², with the system gamma of 1.2 that ITU-R BT.2100 gives for it.
2. 203 cd/m², the reference white of ITU-R BT.2408, becomes the white of sRGB. Two kinds of images are exposed anew,
   because they were made for another white: one in which hardly anything reaches 0.6 of it (made for the older white
   of 100 cd/m²) is brightened, at most to twice; and one that is brighter on average (logarithmic mean above 0.3) than
   photographs are is darkened, until its brightest half per cent is white.
3. The primaries (BT.2020 or P3) become those of BT.709; what lies outside is clipped.
4. Light up to 0.8 of white stays as it is. Above, the brightest channel rolls off towards white, and the other two are
   scaled with it, so that colors keep their hue.
5. The result is encoded with the sRGB curve.

An SDR image that was put into a PQ or HLG signal at the reference white thus comes back as it was, but for its
highlights.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Transfer = Literal["pq", "hlg"]
Primaries = Literal["bt709", "bt2020", "p3"]

REFERENCE_WHITE = 203.0  # cd/m²
HLG_PEAK, HLG_GAMMA = 1000.0, 1.2  # cd/m² of the display, and the system gamma that belongs to it
KNEE = 0.8
DARK, MOST_GAIN = 0.6, REFERENCE_WHITE / 100
BRIGHT, BRIGHTEST_PERCENTILE = 0.3, 99.5
_SAMPLED = 8  # every so many rows and columns are looked at to expose an image

# From these primaries to those of BT.709, all with the white point D65 (ITU-R BT.2087 for BT.2020).
_TO_BT709: dict[Primaries, NDArray[np.float32]] = {
    "bt709": np.eye(3, dtype=np.float32),
    "bt2020": np.array(
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
    ),
    "p3": np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]], np.float32),
}
# Luminance of each primary.
_LUMA: dict[Primaries, tuple[float, float, float]] = {
    "bt709": (0.2126, 0.7152, 0.0722),
    "bt2020": (0.2627, 0.6780, 0.0593),
    "p3": (0.2290, 0.6917, 0.0793),
}
_LEVELS = 2**16
_BAND = 2**20  # pixels that are mapped at once, which bounds the memory


def to_sdr(signal: NDArray[np.uint16], transfer: Transfer, primaries: Primaries = "bt2020") -> NDArray[np.uint8]:
    """Tone-map an HDR image.

    Args:
        signal: H×W×3, R'G'B' as encoded, 0 to 65535.
        transfer: how light is encoded.
        primaries: the colors that the three channels stand for.

    Returns:
        H×W×3 uint8, sRGB.
    """
    exposure = _exposure(_linear(signal[::_SAMPLED, ::_SAMPLED], transfer, primaries))
    out = np.empty(signal.shape, np.uint8)
    rows = max(1, _BAND // signal.shape[1])
    for first in range(0, len(signal), rows):
        band = slice(first, first + rows)
        light = _linear(signal[band], transfer, primaries) * exposure
        brightest = light.max(axis=2)
        excess = np.maximum(brightest - KNEE, 0) / (1 - KNEE)
        # From the knee on with the same slope towards 1.
        rolled = np.minimum(brightest, KNEE) + (1 - KNEE) * excess / (1 + excess)
        light *= (rolled / np.maximum(brightest, 1e-6))[..., None]
        out[band] = _srgb()[np.rint(light * (_LEVELS - 1)).astype(np.uint16)]
    return out


def _linear(signal: NDArray[np.uint16], transfer: Transfer, primaries: Primaries) -> NDArray[np.float32]:
    """Light of BT.709, H×W×3, 0 or more and 1 at the reference white."""
    light = _light(transfer)[signal]
    if transfer == "hlg":
        luminance = cv2.transform(light, np.array([_LUMA[primaries]], np.float32))
        light *= (np.maximum(luminance, 1e-6) ** (HLG_GAMMA - 1) * (HLG_PEAK / REFERENCE_WHITE))[..., None]
    return np.maximum(cv2.transform(light, _TO_BT709[primaries]), 0)


def _exposure(light: NDArray[np.float32]) -> np.float32:
    """What to multiply the light of an image by, of which this is a sample (H×W×3)."""
    brightest = float(np.percentile(light.max(axis=2), BRIGHTEST_PERCENTILE))
    mean = float(np.exp(np.log(light @ np.array(_LUMA["bt709"], np.float32) + 1e-3).mean()))
    if 0 < brightest < DARK:
        return np.float32(min(MOST_GAIN, 1 / brightest))
    return np.float32(1 / brightest if mean > BRIGHT and brightest > 1 else 1)


@cache
def _light(transfer: Transfer) -> NDArray[np.float32]:
    """The light of every signal level: for PQ of 1 at the reference white, for HLG of the scene, up to 1."""
    signal = np.arange(_LEVELS) / (_LEVELS - 1)
    if transfer == "pq":
        m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
        root = signal ** (1 / m2)
        light = 10_000 / REFERENCE_WHITE * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)
    else:
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        light = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)
    return light.astype(np.float32)


@cache
def _srgb() -> NDArray[np.uint8]:
    """The sRGB value of every level of light, of which the last is white."""
    light = np.arange(_LEVELS) / (_LEVELS - 1)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    out: NDArray[np.uint8] = np.rint(255 * encoded).astype(np.uint8)
    return out
