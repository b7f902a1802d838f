"""How samples with more than eight bits, signed or floating, become eight bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Cameras' bit depths: samples in a wider container are taken to have the fewest of these that hold them.
_DEPTHS = (8, 10, 12, 14, 15, 16, 24, 31, 32, 63, 64)
_BRIGHTEST_OF_UNIT = 16.0  # of floats between 0 and 1, highlights may reach so far
_ROWS = 256


class RangeUnknown(ValueError):
    """Samples of which nobody can say what is black and what is white."""


def to_8_bits(samples: NDArray[Any], maximum: int | None = None) -> tuple[NDArray[np.uint8], str | None]:
    """Scale samples of any kind to 0–255.

    The file's own statement goes first. Without one:

    - Unsigned integers have 8, 10, 12, 14, 16, 24 or 32 bits: the fewest that hold the largest sample, which is a
      guess, and said, where the container has more. (16-bit samples that are all multiples of 257 are 8 bits spread
      over 16, however dark.)
    - Signed integers that are never negative are read like unsigned ones; else the type's lowest value is black.
    - Floats up to 1 have 1 as white, up to 16 too, with highlights cut off; up to 255, 255; further ones the largest
      number of 10, 12, 14, 15 or 16 bits that none exceeds. Floats between −1 and 1 have −1 as black. All but the first
      are guesses, and said, unless they reach at least 0.9 of
      255 or 65535.

    Args:
        samples: (h, w) or (h, w, channels), integers or floats.
        maximum: what the file says white is; None: nothing.

    Returns:
        The same shape as uint8, and a warning where a guess was made.

    Raises:
        RangeUnknown: for floats outside of all that.
    """
    kind = samples.dtype.kind
    if kind == "f":
        return _from_floats(samples)
    if kind == "b":
        return np.asarray(samples, np.uint8) * np.uint8(255), None
    low, high = int(samples.min()), int(samples.max())
    bits = 8 * samples.dtype.itemsize
    if low < 0:
        black = -(1 << (bits - 1))
        warning = f"signed {bits}-bit samples: {black} is read as black"
        return _rows(samples, lambda rows: (rows.astype(np.int64) - black) >> (bits - 8)), warning
    if maximum is not None and high <= maximum:
        return _scaled(samples, maximum), None
    if kind == "u" and bits == 16 and _is_spread(samples):
        return _rows(samples, lambda rows: rows >> 8), None
    depth = next(depth for depth in _DEPTHS if high >> depth == 0)
    full = depth >= bits - (kind == "i")
    note = (
        None
        if full
        else f"{bits}-bit samples up to {high} only: read as {depth} bits, as the file does not state its depth"
    )
    return _scaled(samples, (1 << depth) - 1), note


def _scaled(samples: NDArray[Any], maximum: int) -> NDArray[np.uint8]:
    """Integers from 0 to ``maximum``; whole numbers of bits are cut, as 8-bit versions of the same image are."""
    bits = maximum.bit_length()
    if maximum == (1 << bits) - 1 and bits >= 8:
        return _rows(samples, lambda rows: rows >> (bits - 8))
    return _rows(samples, lambda rows: np.rint(rows * (255 / maximum)))


def _from_floats(samples: NDArray[Any]) -> tuple[NDArray[np.uint8], str | None]:
    low, high, finite = _extent(samples)
    warning = None if finite else "NaN samples are read as black"
    black, white = 0.0, 1.0
    if low < -0.01:
        if low < -1 or high > 1:
            raise RangeUnknown(f"floating-point samples from {low:g} to {high:g}")
        black = -1.0
        warning = warning or "floating-point samples below 0: −1 is read as black, 1 as white"
    elif high > 65535:
        raise RangeUnknown(f"floating-point samples up to {high:g}")
    elif high > _BRIGHTEST_OF_UNIT:
        white = float((1 << next(depth for depth in _DEPTHS if high <= (1 << depth) - 1)) - 1)
        if high < 0.9 * white or white not in (255, 65535):
            warning = warning or f"floating-point samples up to {high:g}: {white:g} is read as white"
    elif high > 1.0001:
        warning = warning or f"floating-point samples up to {high:.3g}: 1 is read as white, brighter values are clipped"

    def scaled(rows: NDArray[Any]) -> NDArray[Any]:
        values = np.nan_to_num(rows.astype(np.float32), nan=black, posinf=black, neginf=black)
        out: NDArray[Any] = np.rint(np.clip((values - black) * (255 / (white - black)), 0, 255))
        return out

    return _rows(samples, scaled), warning


def _extent(samples: NDArray[Any]) -> tuple[float, float, bool]:
    """The least and the largest of the samples that are numbers, and whether all are."""
    low, high, all_finite = np.inf, -np.inf, True
    for at in range(0, len(samples), _ROWS):
        rows = samples[at : at + _ROWS]
        finite = rows[np.isfinite(rows)]
        all_finite = all_finite and finite.size == rows.size
        low, high = min(low, float(finite.min(initial=np.inf))), max(high, float(finite.max(initial=-np.inf)))
    if low > high:
        raise RangeUnknown("samples none of which is a number")
    return low, high, all_finite


def _is_spread(samples: NDArray[Any]) -> bool:
    """Whether 16-bit samples are 8-bit ones times 257."""
    return all(
        bool((rows >> 8 == (rows & 255)).all())
        for rows in (samples[at : at + _ROWS] for at in range(0, len(samples), _ROWS))
    )


def _rows(samples: NDArray[Any], scale: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.uint8]:
    """Scale some rows at a time, so that nothing else as large as the image is in memory."""
    out = np.empty(samples.shape, np.uint8)
    for at in range(0, len(samples), _ROWS):
        out[at : at + _ROWS] = scale(samples[at : at + _ROWS])
    return out
