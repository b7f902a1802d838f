"""What training does to an image and its heads: crop, scale, flip, degradations, the conditions of Hu et al."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.views import Placement, place, scaled_size


@dataclass(frozen=True)
class Conditions:
    """Extreme conditions (Hu et al., "Ambient Sound Helps", section 4): each is off where its value is neutral.

    Attributes:
        brightness: all values times this.
        noise: σ of Gaussian noise, of 255.
        black: share of the image under a black rectangle.
    """

    brightness: float = 1.0
    noise: float = 0.0
    black: float = 0.0

    def apply(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """The image H×W×3 as a camera under these conditions would give it (8 bits, clipped)."""
        height, width = image.shape[:2]
        if self.brightness != 1.0:
            image = np.asarray(cv2.convertScaleAbs(image, alpha=self.brightness), np.uint8)
        if self.noise > 0:
            image = add_noise(image, self.noise, rng)
        if self.black > 0:
            aspect = np.exp(rng.uniform(-0.5, 0.5))
            # No narrower than a stripe from top to bottom has to be, or the share could not be reached.
            narrowest = int(np.ceil(width * min(1.0, self.black)))
            w = int(np.clip(round(width * np.sqrt(self.black) * aspect), narrowest, width))
            h = int(min(height, round(self.black * width * height / max(w, 1))))
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            image = image.copy()
            image[y : y + h, x : x + w] = 0
        return image


def add_noise(image: NDArray[np.uint8], sigma: float, rng: np.random.Generator) -> NDArray[np.uint8]:
    """An image H×W×3 with Gaussian noise of its own in every channel, clipped."""
    grain = np.empty(image.shape, np.int16)
    cv2.setRNGSeed(int(rng.integers(2**31)))
    each = cast(Any, (sigma,) * 3)  # one number would mean the first channel alone
    cv2.randn(cast(Any, grain), cast(Any, (0.0,) * 3), each)
    return np.asarray(cv2.add(image, grain, dtype=cv2.CV_8U), np.uint8)


@dataclass(frozen=True)
class ConditionRange:
    """From which the extreme conditions of a training image are drawn.

    Attributes:
        share: of the images that get any at all.
        dark: of these, the share that gets ``brightness`` and ``noise`` together, as cameras have it.
        covered: of the dark ones, the share that gets a black area too; those that are not dark all do.
        brightness: lowest and highest factor; drawn evenly in the logarithm, so that each halving of the light
            comes as often as the one before, or, from a lowest of 0, evenly in the factor (Hu et al.).
        noise: σ from 0 up to this.
        black: share of the image from 0 up to this.
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
class Degradations:
    """What light, cameras and encoders do to a training image, each with a probability of its own.

    Attributes:
        tone: gamma 0.6 to 1.6, gain 0.6 to 1.25 and an offset of ± 25.
        grey: no colour. cast: instead, a gain of 0.8 to 1.2 for each channel.
        dark: light × 0.1 to 0.5 and noise of σ 2 to 25, as at night.
        blur: Gaussian, σ 0.5 to 1.8 pixels.
        noise: σ 3 to 20.
        jpeg: quality 20 to 92.
    """

    tone: float = 0.0
    grey: float = 0.0
    cast: float = 0.0
    dark: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    jpeg: float = 0.0

    def apply(self, image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
        """An image H×W×3, degraded at random."""
        if rng.random() < self.tone:
            curve = 255 * (np.arange(256) / 255) ** rng.uniform(0.6, 1.6)
            curve = curve * rng.uniform(0.6, 1.25) + rng.uniform(-25, 25)
            image = np.asarray(cv2.LUT(image, np.clip(curve, 0, 255).astype(np.uint8)), np.uint8)
        colour = rng.random()
        if colour < self.grey:
            image = np.repeat(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2).astype(np.uint8)
        elif colour < self.grey + self.cast:
            gains = np.arange(256)[:, None] * rng.uniform(0.8, 1.2, 3)
            image = np.asarray(cv2.LUT(image, np.clip(gains, 0, 255).astype(np.uint8)[None]), np.uint8)
        if rng.random() < self.dark:
            image = np.asarray(cv2.convertScaleAbs(image, alpha=rng.uniform(0.1, 0.5)), np.uint8)
            image = add_noise(image, rng.uniform(2, 25), rng)
        if rng.random() < self.blur:
            image = np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.8)), np.uint8)
        if rng.random() < self.noise:
            image = add_noise(image, rng.uniform(3, 20), rng)
        if rng.random() < self.jpeg:
            quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(20, 93))]
            _, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), quality)
            image = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB), np.uint8)
        return image


@dataclass(frozen=True)
class View:
    """How an image is laid on the training canvas.

    Attributes:
        canvas: (width, height) that the network sees.
        native: (width, height) of the model; the image's base scale is the one that fits it in there.
        own_size: take the image's own size for its base scale instead, or if it has more pixels than ``native``, that
            at which it has as many.
        scale: range of a further factor; even in the logarithm.
        wide_scale: another such range. wide_share: of the images whose factor is drawn from it.
        aspect: width over height is changed by a factor of up to e to the ± 2 × this.
        cubic: of enlarged images, the share resampled by cubic instead of linear interpolation.
        flip: whether half of the images are mirrored.
        jitter: contrast and colour factor up to ± this, offset up to ± this times 128.
        degradations: of the image as it lies on the canvas, not of the padding.
    """

    canvas: tuple[int, int]
    native: tuple[int, int]
    scale: tuple[float, float] = (0.75, 1.3)
    flip: bool = True
    jitter: float = 0.2
    own_size: bool = False
    wide_scale: tuple[float, float] = (0.3, 4.0)
    wide_share: float = 0.0
    aspect: float = 0.0
    cubic: float = 0.0
    degradations: Degradations = field(default_factory=Degradations)

    def base_scale(self, width: int, height: int) -> float:
        """The scale of an image of that size before a random factor."""
        if self.own_size:
            return scaled_size(width, height, self.native)[0] / width
        return min(self.native[0] / width, self.native[1] / height)


def random_view(
    image: NDArray[np.uint8], points: NDArray[np.float32], view: View, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32], Placement]:
    """Crop, scale and mirror an image onto the canvas.

    Returns:
        The canvas (H, W, 3) uint8, the heads that lie on it (N, 2) in its pixels, and where the image lies.
    """
    height, width = image.shape[:2]
    wide = view.wide_share > 0 and rng.random() < view.wide_share
    factors = np.log(view.wide_scale if wide else view.scale)
    scale = view.base_scale(width, height) * float(np.exp(rng.uniform(*factors)))
    stretch = float(np.exp(rng.uniform(-view.aspect, view.aspect))) if view.aspect else 1.0
    across, down = scale * stretch, scale / stretch
    # The window of the image that fills the canvas, in the image's pixels.
    want = (view.canvas[0] / across, view.canvas[1] / down)
    w, h = (max(1, min(width, round(want[0]))), max(1, min(height, round(want[1]))))
    x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    window = image[y : y + h, x : x + w]
    size = (
        min(view.canvas[0], max(1, round(w * across))),
        min(view.canvas[1], max(1, round(h * down))),
    )
    if size != (w, h):
        enlarged = cv2.INTER_CUBIC if view.cubic and rng.random() < view.cubic else cv2.INTER_LINEAR
        interpolation = cv2.INTER_AREA if scale < 1 else enlarged
        window = np.asarray(cv2.resize(window, size, interpolation=interpolation), np.uint8)
    offset = (
        int(rng.integers((view.canvas[0] - size[0]) // 8 + 1)) * 8,
        int(rng.integers((view.canvas[1] - size[1]) // 8 + 1)) * 8,
    )
    origin = np.array([x, y], np.float32)
    inside = points[((points >= origin) & (points < origin + np.array([w, h], np.float32))).all(1)]
    moved = (inside - origin) * np.array([size[0] / w, size[1] / h], np.float32)
    if view.flip and rng.random() < 0.5:
        window = window[:, ::-1]
        moved[:, 0] = size[0] - moved[:, 0]
    if view.jitter:
        gain = 1 + rng.uniform(-view.jitter, view.jitter, 3) * 0.5 + rng.uniform(-view.jitter, view.jitter)
        shift = rng.uniform(-view.jitter, view.jitter) * 128
        table = np.clip(np.arange(256)[:, None] * gain + shift, 0, 255).astype(np.uint8)
        window = np.asarray(cv2.LUT(np.ascontiguousarray(window), table[None]), np.uint8)
    window = view.degradations.apply(np.ascontiguousarray(window), rng)
    canvas = place(np.ascontiguousarray(window), view.canvas, offset)
    placement = Placement(scale, offset, size)
    return canvas, keep_inside(moved + np.asarray(offset, np.float32), placement), placement


def keep_inside(points: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """Heads (N, 2) of a placed image that rounding or mirroring put on its border, back by the least step."""
    first = np.array(placement.offset, np.float32)
    last = np.nextafter(first + np.array(placement.size, np.float32), np.float32(0))
    return np.clip(points, first, last)
