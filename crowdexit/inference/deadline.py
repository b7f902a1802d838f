"""Check whether a deadline can be met; for tiled images it is predicted before they are counted."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from crowdexit.data.views import Box, canvas_size
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.errors import CounterError
from crowdexit.inference.latency import Latency
from crowdexit.inference.preprocessing import Row
from crowdexit.inference.profile import PREPARING
from crowdexit.models.network import Config

Late = Literal["wait", "fail"]

# With late="wait", how many times the deadline the first answer may be predicted to take before the image is refused.
MOST_LATE = 10


def check_deadline(deadline_ms: float | None) -> None:
    """Refuse a deadline that is not positive, before anything is loaded.

    Raises:
        CounterError: for such a deadline.
    """
    if deadline_ms is not None and not deadline_ms > 0:
        raise CounterError(f"a deadline of {deadline_ms:g} ms is not positive")


def latest_ms(deadline_ms: float, late: Late) -> float:
    """Latest time for the first result of a tiled image."""
    return deadline_ms * (1 if late == "fail" else MOST_LATE)


def check_before_decoding(
    latency: Latency, config: Config, exit: str, boxes: Sequence[Box], deadline_ms: float, most_ms: float
) -> None:
    """Refuse a tiled image before it is decoded, if the first exit is predicted to answer too late.

    Raises:
        DeadlineMissed: if decoding and counting are predicted to exceed ``most_ms``.
    """
    if config.view == "tiles":  # of those it is only predicted once they are there
        return
    canvases = [canvas_size(width, height, config.size, config.view) for *_, width, height in boxes]
    counting, decoding = latency.predicted_s(canvases, exit), latency.times.ms(PREPARING)
    if counting is None or decoding is None:
        return
    # The profile's image has four times the pixels of the scene.
    pixels = sum(width * height for *_, width, height in boxes)
    decoding *= pixels / (4 * config.scene[0] * config.scene[1])
    # Half of the nominal time, as formats differ: images that may be in time are tried.
    takes_ms = 1000 * counting + decoding / 2
    if takes_ms > most_ms:
        raise _too_late(deadline_ms, len(boxes), exit, takes_ms)


def exits_in_time(
    latency: Latency, rows: Sequence[Row], exits: Sequence[str], begun: float, deadline: float, last_moment: float
) -> Sequence[str]:
    """The exits to run for a tiled image: the first, and those predicted to meet the deadline.

    Args:
        begun, deadline, last_moment: as of :func:`time.perf_counter`; ``last_moment`` applies to the first exit.

    Raises:
        DeadlineMissed: if the first exit is predicted to miss ``last_moment``.
    """
    now = time.perf_counter()
    canvases = [(canvas.shape[1], canvas.shape[0]) for canvas, *_ in rows]
    predicted = {name: latency.predicted_s(canvases, name) for name in exits}
    first = predicted[exits[0]]
    if first is not None and now + first > last_moment:
        raise _too_late(1000 * (deadline - begun), len(rows), exits[0], 1000 * (now + first - begun))
    if len(rows) <= latency.collator.rows_in_flight:  # all tiles reach an exit before any continues
        return exits
    fits = [name for name in exits[1:] if (s := predicted[name]) is not None and now + s <= deadline]
    return [exits[0], *fits]


def _too_late(within_ms: float, tiles: int, exit: str, takes_ms: float) -> DeadlineMissed:
    return DeadlineMissed(
        f"no exit can answer within {within_ms:g} ms: the image is cut into {tiles} tiles, for which the first, "
        f"{exit}, takes about {takes_ms:.0f} ms here"
    )
