"""What a count returns: each exit's result, and all of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.mel import AudioStatus


@dataclass(frozen=True)
class ExitResult:
    """What one exit says.

    Attributes:
        exit: its name.
        count: people.
        interval: (low, high), or None where the checkpoint is not calibrated.
        latency_ms: from the request to this answer, preparing the image included.
        density: (h, w) heads per cell of 8×8 network pixels over the image without padding; None from exits that
            make none.
        warnings: what the reader of the input had to say, e.g. of damage; the same of every exit.
        audio: whether this exit was given audio, or why not: ``none`` was there, it was ``unreadable``, the image is
            ``tiled`` (audio belongs to all of it), or it is ``switched off`` (also where this exit uses none).
        familiar: whether the image is like those that the network was trained on; False: the count may be far off.
            None: the checkpoint has no statistics of them. The same of every exit.
    """

    exit: str
    count: float
    interval: tuple[float, float] | None
    latency_ms: float
    density: NDArray[np.float32] | None = None
    warnings: tuple[str, ...] = ()
    audio: AudioStatus = "none"
    familiar: bool | None = None


@dataclass(frozen=True)
class CountResult:
    """All answers to one request, the one that was chosen, and what the reader of the input had to say."""

    model: str
    chosen: ExitResult
    exits: tuple[ExitResult, ...]
    in_time: bool | None = None  # whether the chosen answer came by the deadline; None: there was none
    warnings: tuple[str, ...] = ()  # one line each; a count with a warning may be wrong

    @property
    def count(self) -> float:
        """People, as the chosen exit counts them."""
        return self.chosen.count

    @property
    def audio(self) -> AudioStatus:
        """Whether the chosen exit was given audio, or why not: see :class:`ExitResult`."""
        return self.chosen.audio

    @property
    def familiar(self) -> bool | None:
        """Whether the image is like those that the network was trained on: see :class:`ExitResult`."""
        return self.chosen.familiar

    def to_dict(self, source: str) -> dict[str, Any]:
        """The JSON form; with a deadline also ``in_time``."""
        return {
            "source": source,
            "model": self.model,
            "count": round(self.count, 2),
            "chosen_exit": self.chosen.exit,
            "latency_ms": round(self.chosen.latency_ms, 2),
            "exits": [
                {
                    "exit": e.exit,
                    "count": round(e.count, 2),
                    "interval": None if e.interval is None else [round(bound, 2) for bound in e.interval],
                    "latency_ms": round(e.latency_ms, 2),
                }
                for e in self.exits
            ],
            "audio": self.audio,
            "familiar": self.familiar,
            "warnings": list(self.warnings),
            **({} if self.in_time is None else {"in_time": self.in_time}),
        }
