"""What a count looks like: the density map over its image, a line of text on it, and bars for each exit."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from crowdexit.results import ExitResult

Pixels = NDArray[np.uint8]

# Below this many heads a cell the map of an empty place would be its own noise, blown up to full colour.
_LEAST_PEAK = 0.01
_LEAST_TEXT = 9  # pixels of a capital letter; smaller than that nobody reads

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_CAPITAL = 22  # height of its capitals at scale 1
_TO_ASCII = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "×": "x", "±": "+-", "≈": "~", "→": "->", "·": "-", "‘": "'", "’": "'"}
    | {"“": '"', "”": '"', "„": '"', "ß": "ss", "µ": "u", "æ": "ae", "ø": "o", "ł": "l"}
)


def overlay(image: Pixels, density: NDArray[np.float32], *, strength: float = 0.85) -> Pixels:
    """A density map over its picture: clear where nobody is, from violet to yellow where people stand.

    Args:
        image: H×W×3 uint8, RGB.
        density: (h, w), heads per cell over the whole image, of any resolution.
        strength: 0 (only the image) to 1 (the crowd hides it).

    Returns:
        H×W×3 uint8, RGB, a new array.
    """
    height, width = image.shape[:2]
    # A little smoothing first: single cells are squares, and a crowd is none.
    people = np.maximum(np.nan_to_num(density), 0).astype(np.float32)
    smooth = np.asarray(cv2.GaussianBlur(people, (0, 0), 0.8), np.float32)
    shade = np.clip(smooth / _peak(smooth), 0, 1) ** 0.7  # the thin parts of a dense crowd stay visible
    shade = np.clip(cv2.resize(shade, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)
    # The map's darkest sixth is left out: it would vanish on dark clothes.
    levels = ((0.16 + 0.84 * shade) * 255).astype(np.uint8)
    colours = cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_PLASMA), cv2.COLOR_BGR2RGB)
    # Opacity climbs faster than the colour and is zero for the faint noise that any network leaves.
    alpha = strength * np.clip((shade - 0.06) / 0.4, 0, 1)
    return np.asarray(cv2.blendLinear(image, colours, 1 - alpha, alpha), np.uint8)


def _peak(density: NDArray[np.float32]) -> float:
    """The density to show in full colour: few cells lie above it, wherever people are at all."""
    highest = float(density.max(initial=0))
    occupied = density[density > 0.05 * highest]
    return max(_LEAST_PEAK, float(np.percentile(occupied, 98)) if occupied.size else 0)


def banner(image: Pixels, text: str) -> Pixels:
    """The image with one line of text on a dark strip along its top, scaled to fit.

    Args:
        image: H×W×3 uint8, RGB.
        text: any line; what OpenCV's font lacks is written in ASCII. Cut short with dots where the image is
            too narrow for it to be read.

    Returns:
        H×W×3 uint8, RGB, a new array.
    """
    out = image.copy()
    height, width = image.shape[:2]
    text = _ascii(text)
    wanted = max(14.0, min(height, width) / 24)  # pixels of a capital
    margin = max(2, round(wanted * 0.55))
    room = width - 2 * margin
    size = min(wanted, wanted * room / max(1, _text_width(text, wanted)), height / 2)
    if size < _LEAST_TEXT:
        size = min(_LEAST_TEXT, height / 2)
        text = _cut(text, size, room)
    strip = min(height, round(size + 2 * margin))
    out[:strip] = out[:strip] // 4
    thickness = max(1, round(size / 9))
    line = (strip + round(size)) // 2
    cv2.putText(out, text, (margin, line), _FONT, size / _CAPITAL, (255, 255, 255), thickness, cv2.LINE_AA)
    return out


def _text_width(text: str, capital: float) -> int:
    (width, _), _ = cv2.getTextSize(text, _FONT, capital / _CAPITAL, max(1, round(capital / 9)))
    return int(width)


def _cut(text: str, size: float, room: int) -> str:
    if _text_width(text, size) <= room:
        return text
    while text and _text_width(text + "...", size) > room:
        text = text[:-1]
    return text.rstrip() + "..."


def _ascii(text: str) -> str:
    """The text in printable ASCII on one line: accents dropped, dashes and signs spelt, the rest '?'."""
    plain = unicodedata.normalize("NFKD", " ".join(text.split()).translate(_TO_ASCII))
    kept = "".join(c for c in plain if not unicodedata.combining(c))
    return "".join(c if " " <= c <= "~" else "?" for c in kept)


def bars(results: Sequence[ExitResult]) -> Figure:
    """Count (with its interval, where there is one) and latency of each exit, side by side.

    Drawn without a background and in middle grey, so that it reads on a light page and on a dark one.

    Args:
        results: the answers in the order in which they came; none gives empty axes.
    """
    from matplotlib.figure import Figure  # only the page draws charts; counting need not wait for matplotlib

    figure = Figure(figsize=(5.2, 0.5 + 0.36 * max(1, len(results))), dpi=200, layout="constrained")
    figure.patch.set_alpha(0)
    names = [result.exit for result in results]
    counts = [result.count for result in results]
    spans = [result.interval or (result.count, result.count) for result in results]
    whiskers = np.array([[c - low, high - c] for c, (low, high) in zip(counts, spans, strict=True)]).reshape(-1, 2)
    left, right = figure.subplots(1, 2, sharey=True)
    charts = [
        (left, "people", counts, "#e8663c", whiskers.T, [high for _, high in spans]),
        (right, "milliseconds", [r.latency_ms for r in results], "#4b7fd1", None, None),
    ]
    grey = "#858585"
    for axes, unit, values, colour, errors, reach in charts:
        axes.patch.set_alpha(0)
        axes.barh(names, values, color=colour, height=0.62)
        if errors is not None and errors.any():
            axes.errorbar(values, names, xerr=errors, fmt="none", ecolor=grey, capsize=3, linewidth=1.2)
        ends = reach or values
        for row, (value, end) in enumerate(zip(values, ends, strict=True)):
            axes.annotate(
                f"{value:,.0f}", (end, row), (5, 0), textcoords="offset points", va="center", color=grey, fontsize=10
            )
        axes.set_xlim(0, 1.4 * max([*ends, 1e-9]) if any(ends) else 1)
        axes.set_title(unit, color=grey, fontsize=10, loc="left")
        axes.tick_params(colors=grey, labelsize=10, length=0)
        axes.xaxis.set_visible(False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    left.invert_yaxis()  # the first exit on top
    return figure
