"""What is known of a prepared image, and its density from the maps of its rows. NumPy and OpenCV alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.mel import AudioStatus
from crowdexit.data.views import Box, Placement

STRIDE = 8  # pixels of a canvas to a cell of its density map


@dataclass(frozen=True)
class ImageInfo:
    """What is to be known of an image once it is prepared.

    Attributes:
        size: (width, height) in pixels.
        audio: whether it is counted with audio, or why not.
        rows: for each row that it takes in a batch, the rectangle of the image that is seen there, and how it
            lies on the network's canvas.
        warnings: of the readers, which every result carries.
    """

    size: tuple[int, int]
    audio: AudioStatus
    rows: Sequence[tuple[Box, Placement]]
    warnings: tuple[str, ...] = ()

    @property
    def has_audio(self) -> bool:
        """Whether it is counted with audio."""
        return self.audio == "used"

    def density(self, maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """One density map (h, w) of the image from those of its rows; of a tiled one at most 2048 cells a side.

        Each tile's mass is kept.
        """
        parts = [(box, _without_padding(map_, at)) for map_, (box, at) in zip(maps, self.rows, strict=True)]
        if len(parts) == 1:
            return parts[0][1]
        width, height = self.size
        scale = min(1 / STRIDE, 2048 / max(width, height))
        out = np.zeros((math.ceil(height * scale), math.ceil(width * scale)), np.float32)
        for (x, y, w, h), density in parts:
            x0, y0, x1, y1 = (round(v * scale) for v in (x, y, x + w, y + h))
            x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
            laid = cv2.resize(density, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
            mass = float(laid.sum())
            target = out[y0:y1, x0:x1]
            if mass > 0:
                target += (laid * (float(density.sum()) / mass))[: target.shape[0], : target.shape[1]]
        return out


def _without_padding(density: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """The cells of a canvas' density map that the image covers; no mass lies outside them."""
    (x, y), (w, h) = placement.offset, placement.size
    return density[y // STRIDE : -(-(y + h) // STRIDE), x // STRIDE : -(-(x + w) // STRIDE)]
