"""What training does to a picture and its heads: crop, scale, flip, light, and the extreme conditions of Hu et al."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.picture import Placement, place


@dataclass(frozen=True)
class Conditions:
    """Extreme conditions (Hu et al., "Ambient Sound Helps", section 4): each is off where its value is neutral.

    Attributes:
        brightness: all values times this.
        noise: σ of Gaussian noise, of 255.
        black: share of the picture under a black rectangle.
    """

    brightness: float = 1.0
    noise: float = 0.0
    black: float = 0.0

    def apply(self, picture: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """The picture H×W×3 as a camera under these conditions would give it (8 bits, clipped)."""
        height, width = picture.shape[:2]
        if self.brightness != 1.0:
            picture = np.asarray(cv2.convertScaleAbs(picture, alpha=self.brightness), np.uint8)
        if self.noise > 0:
            grain = np.empty(picture.shape, np.int16)
            cv2.setRNGSeed(int(rng.integers(2**31)))
            each = cast(Any, (self.noise,) * 3)  # one number would mean the first channel alone
            cv2.randn(cast(Any, grain), cast(Any, (0.0,) * 3), each)
            picture = np.asarray(cv2.add(picture, grain, dtype=cv2.CV_8U), np.uint8)
        if self.black > 0:
            aspect = np.exp(rng.uniform(-0.5, 0.5))
            # No narrower than a stripe from top to bottom has to be, or the share could not be reached.
            narrowest = int(np.ceil(width * min(1.0, self.black)))
            w = int(np.clip(round(width * np.sqrt(self.black) * aspect), narrowest, width))
            h = int(min(height, round(self.black * width * height / max(w, 1))))
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            picture = picture.copy()
            picture[y : y + h, x : x + w] = 0
        return picture


@dataclass(frozen=True)
class ConditionRange:
    """From which the extreme conditions of a training picture are drawn.

    Attributes:
        share: of the pictures that get any at all.
        dark: of these, the share that gets ``brightness`` and ``noise`` together, as cameras have it.
        covered: of the dark ones, the share that gets a black area too; those that are not dark all do.
        brightness: lowest and highest factor; drawn evenly in the logarithm, so that each halving of the light
            comes as often as the one before, or, from a lowest of 0, evenly in the factor (Hu et al.).
        noise: σ from 0 up to this.
        black: share of the picture from 0 up to this.
    """

    share: float = 0.0
    brightness: tuple[float, float] = (0.05, 0.5)
    noise: float = 50.0
    black: float = 0.3
    dark: float = 0.8
    covered: float = 0.3

    def draw(self, rng: np.random.Generator) -> Conditions:
        """Conditions for one picture: darkness with noise or a black area, or both, or none."""
        if rng.random() >= self.share:
            return Conditions()
        dark, covered = rng.random() < self.dark, rng.random() < self.covered
        low, high = self.brightness
        factor = np.exp(rng.uniform(np.log(low), np.log(high))) if low > 0 else rng.uniform(low, high)
        return Conditions(
            brightness=float(factor) if dark else 1.0,
            noise=float(rng.uniform(0, self.noise)) if dark else 0.0,
            black=float(rng.uniform(0, self.black)) if covered or not dark else 0.0,
        )


@dataclass(frozen=True)
class View:
    """How a picture is laid on the training canvas.

    Attributes:
        canvas: (width, height) that the network sees.
        native: (width, height) of the model; the picture's base scale is the one that fits it in there.
        scale: range of a further factor; even in the logarithm.
        flip: whether half of the pictures are mirrored.
        jitter: contrast and colour factor up to ± this, offset up to ± this times 128.
    """

    canvas: tuple[int, int]
    native: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.3)
    flip: bool = True
    jitter: float = 0.2


def random_view(
    picture: NDArray[np.uint8], points: NDArray[np.float32], view: View, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32], Placement]:
    """Crop, scale and mirror a picture onto the canvas.

    Returns:
        The canvas (H, W, 3) uint8, the heads that lie on it (N, 2) in its pixels, and where the picture lies.
    """
    height, width = picture.shape[:2]
    base = min(view.native[0] / width, view.native[1] / height)
    scale = base * float(np.exp(rng.uniform(*np.log(view.scale))))
    # The window of the picture that fills the canvas, in the picture's pixels.
    want = (view.canvas[0] / scale, view.canvas[1] / scale)
    w, h = (max(1, min(width, round(want[0]))), max(1, min(height, round(want[1]))))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    window = picture[y : y + h, x : x + w]
    size = (
        min(view.canvas[0], max(1, round(w * scale))),
        min(view.canvas[1], max(1, round(h * scale))),
    )
    if size != (w, h):
        window = np.asarray(
            cv2.resize(window, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR),
            np.uint8,
        )
    offset = (
        int(rng.integers((view.canvas[0] - size[0]) // 8 + 1)) * 8,
        int(rng.integers((view.canvas[1] - size[1]) // 8 + 1)) * 8,
    )
    origin = np.array([x, y], np.float32)
    seen = points[((points >= origin) & (points < origin + np.array([w, h], np.float32))).all(1)]
    moved = (seen - origin) * np.array([size[0] / w, size[1] / h], np.float32)
    if view.flip and rng.random() < 0.5:
        window = window[:, ::-1]
        moved[:, 0] = size[0] - moved[:, 0]
    if view.jitter:
        gain = 1 + rng.uniform(-view.jitter, view.jitter, 3) * 0.5 + rng.uniform(-view.jitter, view.jitter)
        shift = rng.uniform(-view.jitter, view.jitter) * 128
        table = np.clip(np.arange(256)[:, None] * gain + shift, 0, 255).astype(np.uint8)
        window = np.asarray(cv2.LUT(np.ascontiguousarray(window), table[None]), np.uint8)
    canvas = place(np.ascontiguousarray(window), view.canvas, offset)
    placement = Placement(scale, offset, size)
    return canvas, keep_inside(moved + np.asarray(offset, np.float32), placement), placement


def keep_inside(points: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Heads (N, 2) of a placed picture that rounding or mirroring put on its border, back by the least step."""
    first = np.array(placement.offset, np.float32)
    last = np.nextafter(first + np.array(placement.size, np.float32), np.float32(0))
    return np.clip(points, first, last)
