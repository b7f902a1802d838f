"""Training images without anybody: drawn patterns, mosaics of other images, empty parts of crowds and of a background,
and textures made of these parts.

A network that has only seen crowds finds heads in fur, foliage and tiles.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
Pattern = Callable[[np.random.Generator, int, int], NDArray[Any]]
Headless = Callable[[np.random.Generator, tuple[int, int]], Image | None]

# How often each kind is drawn, of those there are images for.
MOSAIC, PATTERN, SHAPES, HEADLESS, SCRAMBLED, DETAILED, BACKGROUND = 0.20, 0.22, 0.06, 0.18, 0.10, 0.18, 0.06
_NOISE = 25.0  # largest σ over a pattern
_TILES = (16, 32, 48, 64, 96, 128, 192, 384, 640)  # sides in pixels of a mosaic's images
_PIECES = (24, 192)  # sides in pixels of a quilt's pieces
_SHORTEST, _LONGEST = 60, 420  # shorter side in pixels of a part that is enlarged to the canvas
_MARGIN = 24  # pixels around a part that are free of head points too: a head is larger than its point


def _ramp(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """H×W from 0 to 1 in a random direction."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    ramp = x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)
    return np.asarray((ramp - ramp.min()) / (np.ptp(ramp) + 1e-3), np.float32)


def _noise(rng: np.random.Generator, width: int, height: int, channels: int = 1) -> NDArray[np.float32]:
    """Gaussian noise of σ 1, H×W×channels."""
    return rng.standard_normal((height, width, channels), np.float32)


def _enlarged(values: NDArray[Any], width: int, height: int, interpolation: int) -> NDArray[np.float32]:
    """Small arrays h×w×C as float32 H×W×C."""
    resized = cv2.resize(np.asarray(values, np.float32), (width, height), interpolation=interpolation)
    return np.asarray(resized, np.float32).reshape(height, width, -1)


def _regions(rng: np.random.Generator, width: int, height: int, sharpness: float) -> NDArray[np.float32]:
    """Large blobs from 0 to 1, H×W×1."""
    coarse = _noise(rng, 2 + int(rng.integers(1, 5)), 2 + int(rng.integers(1, 5)))
    return np.asarray(1 / (1 + np.exp(-sharpness * _enlarged(coarse, width, height, cv2.INTER_CUBIC))), np.float32)


def _blend(rng: np.random.Generator, share: NDArray[Any]) -> NDArray[Any]:
    """Two random colours, mixed as H×W ``share`` says; half the time such as hair, earth and stone have."""
    one, other = rng.uniform(0, 255, (2, 3))
    if rng.random() < 0.5:
        one, other = (rng.uniform(10, 245) + rng.uniform(-5, 35) * np.array([1.0, 0.2, -0.8]) for _ in range(2))
    return np.asarray(one + (other - one) * share[..., None])


def flat(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """One colour."""
    return np.full((height, width, 3), rng.uniform(0, 255, 3))


def gradient(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """From one colour to another."""
    return _blend(rng, _ramp(rng, width, height))


def stripes(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """A sine of any direction, with periods from 5 to 300 pixels."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(0.02, 1.2)
    wave = np.sin(frequency * (x * np.cos(angle) + y * np.sin(angle)))
    return np.asarray(127 + rng.uniform(20, 127) * wave[..., None] * rng.uniform(0.3, 1, 3))


def patches(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """A grid of random colours, with sharp or soft edges."""
    side = int(rng.integers(4, 60))
    colours = rng.uniform(0, 255, (height // side + 2, width // side + 2, 3))
    return _enlarged(colours, width, height, int(rng.choice([cv2.INTER_NEAREST, cv2.INTER_LINEAR, cv2.INTER_CUBIC])))


def checkerboard(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Squares of two colours."""
    side = int(rng.integers(3, 30))
    y, x = np.mgrid[:height, :width]
    return np.asarray(255.0 * ((x // side + y // side) % 2)[..., None] * rng.uniform(0.2, 1, 3))


def spots(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Blobs of two colours, as on fur: band-passed noise under a soft threshold."""
    sigma = float(rng.uniform(1.5, 14))
    noise = _noise(rng, width, height)[..., 0]
    band = cv2.GaussianBlur(noise, (0, 0), sigma) - cv2.GaussianBlur(noise, (0, 0), sigma * 1.7)
    band = band / (band.std() + 1e-6)
    blobs = _blend(rng, 1 / (1 + np.exp(-rng.uniform(1.5, 8) * (band - rng.uniform(-0.8, 1.2)))))
    shade = cv2.GaussianBlur(_noise(rng, width, height)[..., 0], (0, 0), 3)
    return np.asarray(blobs + rng.uniform(0, 90) * shade[..., None])


def clouds(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Fractal noise, as of foliage, stone and cloud."""
    total = np.zeros((height, width, 3), np.float32)
    persistence, strength = rng.uniform(0.4, 0.85), 1.0
    for octave in range(7):
        side = 2 ** (7 - octave)
        channels = 3 if rng.random() < 0.3 else 1
        coarse = _noise(rng, width // side + 2, height // side + 2, channels)
        total += strength * _enlarged(coarse, width, height, cv2.INTER_CUBIC)
        strength *= persistence
    return np.asarray(rng.uniform(40, 210, 3) + total / (total.std() + 1e-6) * rng.uniform(15, 60))


def cells(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Voronoi cells that darken or lighten from their centres, as stones, tiles and scales."""
    centres = rng.uniform((0, 0), (width, height), (int(rng.integers(20, 700)), 2)).astype(int)
    free = np.full((height, width), 255, np.uint8)
    free[centres[:, 1], centres[:, 0]] = 0
    distance, label = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    number = int(label.max()) + 1
    colours = rng.uniform(60, 220, 3) + rng.normal(0, rng.uniform(5, 50), (number, 1))
    colours = colours + rng.normal(0, rng.uniform(0, 20), (number, 3))
    return np.asarray(colours[label] - distance[..., None] * rng.uniform(-2, 4))


def fur(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Fine strokes in one direction, often spotted, as of fur, grass and straw."""
    half, angle = int(rng.integers(2, 16)), rng.uniform(0, np.pi)
    across, down = round(half * np.cos(angle)), round(half * np.sin(angle))
    stroke = np.zeros((2 * half + 1, 2 * half + 1), np.float32)
    cv2.line(stroke, (half - across, half - down), (half + across, half + down), (1.0,))
    strokes = cv2.filter2D(_noise(rng, width, height)[..., 0], -1, stroke / stroke.sum())
    ground = spots(rng, width, height) if rng.random() < 0.6 else gradient(rng, width, height)
    return np.asarray(ground + (strokes / (strokes.std() + 1e-6) * rng.uniform(5, 40))[..., None])


def streaks(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Noise dragged along curved lines, as of hair, bark, water and wood."""
    swing = cv2.GaussianBlur(_noise(rng, width, height)[..., 0], (0, 0), float(rng.uniform(20, 90)))
    angle = swing / (swing.std() + 1e-6) * rng.uniform(0, 0.8) + rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    across, down = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    strokes = cv2.GaussianBlur(_noise(rng, width, height)[..., 0], (0, 0), float(rng.uniform(0.6, 2.5)))
    for reach in range(int(rng.integers(2, 6))):  # each time twice as far: 2 to 32 pixels in all
        moved = cv2.remap(
            strokes, x + across * 2**reach, y + down * 2**reach, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT
        )
        strokes = (strokes + moved) / 2
    share = 1 / (1 + np.exp(-rng.uniform(1, 6) * (strokes / (strokes.std() + 1e-6) + rng.uniform(-1, 1))))
    return _blend(rng, share)


def dead_leaves(rng: np.random.Generator, width: int, height: int) -> NDArray[Any]:
    """Ellipses that cover each other, their number falling with the cube of their size, as things in nature do.

    The dead-leaves model (Lee, Mumford & Huang, "Occlusion models for natural images", IJCV 2001).
    """
    low, high = float(rng.uniform(3, 12)), float(rng.uniform(40, 200))
    number = int(rng.integers(200, 2500))
    # Radii of a density r^-3 between the two, by the inverse of its distribution.
    radii = 1 / np.sqrt(rng.uniform(high**-2, low**-2, number))
    image = np.full((height, width, 3), rng.uniform(0, 255, 3), np.uint8)
    ground, spread = rng.uniform(40, 210, 3), rng.uniform(10, 70)
    for radius in radii:
        centre = int(rng.integers(width)), int(rng.integers(height))
        axes = max(1, int(radius)), max(1, int(radius * rng.uniform(0.3, 1)))
        colour = np.clip(ground + rng.normal(0, spread) + rng.normal(0, spread / 3, 3), 0, 255)
        cv2.ellipse(image, centre, axes, float(rng.uniform(0, 180)), 0, 360, colour.tolist(), cv2.FILLED, cv2.LINE_AA)
    return np.asarray(cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.5)), np.float32)


PATTERNS: tuple[Pattern, ...] = (
    *(flat, gradient, stripes, patches, checkerboard, spots, clouds, cells, fur, streaks, dead_leaves),
)


DETAILS: tuple[Pattern, ...] = (spots, spots, clouds, cells, fur, fur, streaks, dead_leaves)


def _slanted(rng: np.random.Generator, image: NDArray[Any]) -> NDArray[Any]:
    """An image H×W×3 as a plane that is not seen from the front: what repeats is larger on one side."""
    height, width = image.shape[:2]
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)], np.float32)
    moved = corners + rng.uniform(-0.4, 0.4, (4, 2)) * (width, height)
    slant = cv2.getPerspectiveTransform(corners, moved.astype(np.float32))
    slanted = cv2.warpPerspective(image.astype(np.float32), slant, (width, height), borderMode=cv2.BORDER_REFLECT)
    return np.asarray(slanted)


def pattern(rng: np.random.Generator, width: int, height: int) -> Image:
    """One of the patterns, or two with a soft border between them, slanted, lit unevenly, with noise over it, H×W×3."""
    drawn = PATTERNS[rng.integers(len(PATTERNS))](rng, width, height)
    if rng.random() < 0.3:
        other = PATTERNS[rng.integers(len(PATTERNS))](rng, width, height)
        drawn = drawn + (other - drawn) * _regions(rng, width, height, float(rng.uniform(2, 20)))
    if rng.random() < 0.3:
        drawn = _slanted(rng, drawn)
    if rng.random() < 0.3:
        drawn = drawn * (1 - rng.uniform(0.2, 0.8) * _regions(rng, width, height, 1.5))
    noisy = drawn + rng.uniform(0, _NOISE) * _noise(rng, width, height)
    out: Image = np.clip(noisy, 0, 255).astype(np.uint8)
    return out


def shapes(rng: np.random.Generator, ground: Image) -> Image:
    """Lines, rectangles, circles and writing over a ground H×W×3."""
    image = ground.copy()
    height, width = image.shape[:2]
    for _ in range(int(rng.integers(3, 60))):
        colour = tuple(int(value) for value in rng.integers(0, 256, 3))
        one, other = ((int(x), int(y)) for x, y in rng.integers(0, (width, height), (2, 2)))
        thickness = int(rng.choice([cv2.FILLED, 1, 3]))
        kind = rng.integers(4)
        if kind == 0:
            cv2.line(image, one, other, colour, int(rng.integers(1, 8)))
        elif kind == 1:
            cv2.rectangle(image, one, other, colour, thickness)
        elif kind == 2:
            cv2.circle(image, one, int(rng.integers(2, 40)), colour, thickness)
        else:
            text = "".join(map(chr, rng.integers(ord("0"), ord("z") + 1, 8)))
            font, size = int(rng.integers(0, 7)), float(rng.uniform(0.4, 2))
            cv2.putText(image, text, one, font, size, colour, int(rng.integers(1, 4)))
    return image


def mosaic(rng: np.random.Generator, width: int, height: int, draw: Callable[[], Image]) -> Image:
    """Small images from ``draw``, each enlarged to one size, side by side, H×W×3."""
    side = int(rng.choice(_TILES))
    interpolation = int(rng.choice([cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_LANCZOS4]))
    columns, rows = -(-width // side), -(-height // side)
    bands = [
        np.concatenate([cv2.resize(draw(), (side, side), interpolation=interpolation) for _ in range(columns)], 1)
        for _ in range(rows)
    ]
    return np.ascontiguousarray(np.concatenate(bands, 0)[:height, :width], np.uint8)


def quilt(rng: np.random.Generator, image: Image) -> Image:
    """Pieces of an image H×W×3, each turned and mirrored, in another order: its textures without its things."""
    height, width = image.shape[:2]
    side = min(int(np.exp(rng.uniform(*np.log(_PIECES)))), height, width)
    pieces = np.empty((-(-height // side) * side, -(-width // side) * side, 3), np.uint8)
    for top in range(0, height, side):
        for left in range(0, width, side):
            y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            piece = np.rot90(image[y : y + side, x : x + side], int(rng.integers(4)))
            pieces[top : top + side, left : left + side] = piece[:, ::-1] if rng.random() < 0.5 else piece
    return np.ascontiguousarray(pieces[:height, :width])


def rephased(rng: np.random.Generator, image: Image) -> Image:
    """An image H×W×3 with its frequencies and colours, but at other places: each phase moved by a random one."""
    height, width = image.shape[:2]
    moved = np.angle(np.fft.rfft2(rng.standard_normal((height, width))))
    spectrum = np.fft.rfft2(image.astype(np.float32), axes=(0, 1)) * np.exp(1j * moved)[..., None]
    spectrum[0, 0] = np.abs(spectrum[0, 0])  # the mean stays
    return np.clip(np.fft.irfft2(spectrum, (height, width), axes=(0, 1)), 0, 255).astype(np.uint8)


def scrambled(rng: np.random.Generator, image: Image) -> Image:
    """A texture made of an image H×W×3."""
    return quilt(rng, image) if rng.random() < 0.6 else rephased(rng, image)


def detailed(rng: np.random.Generator, ground: Image) -> Image:
    """A ground H×W×3 whose light and colours stay, with a pattern's detail on it: an enlarged animal gets fur."""
    height, width = ground.shape[:2]
    drawn = np.clip(DETAILS[rng.integers(len(DETAILS))](rng, width, height), 0, 255)
    drawn = (_slanted(rng, drawn) if rng.random() < 0.5 else drawn).mean(2, keepdims=True)
    strength = (
        rng.uniform(0.1, 0.5) * _regions(rng, width, height, 2.0) if rng.random() < 0.5 else rng.uniform(0.1, 0.5)
    )
    detail = np.clip((drawn - drawn.mean()) / (drawn.std() + 1e-6), -2, 2)
    out: Image = np.clip(ground * (1 + strength * detail), 0, 255).astype(np.uint8)
    return out


def random_box(
    rng: np.random.Generator, image: tuple[int, int], canvas: tuple[int, int], longest: int = _LONGEST
) -> tuple[int, int, int, int]:
    """A part (x, y, w, h) of an image (width, height), in the canvas' shape, its shorter side 60 to ``longest``."""
    scale = int(rng.integers(_SHORTEST, max(_SHORTEST, longest) + 1)) / min(canvas)
    scale = min(scale, image[0] / canvas[0], image[1] / canvas[1])
    w, h = (max(1, int(side * scale)) for side in canvas)
    return int(rng.integers(image[0] - w + 1)), int(rng.integers(image[1] - h + 1)), w, h


def is_headless(points: NDArray[Any], box: tuple[int, int, int, int]) -> bool:
    """Whether no head point (N, 2) lies in a part (x, y, w, h) or within 24 pixels of it."""
    x, y, w, h = box
    first, last = np.array([x, y]) - _MARGIN, np.array([x + w, y + h]) + _MARGIN
    return not ((points > first) & (points < last)).all(1).any()


def cut(image: Image, box: tuple[int, int, int, int], canvas: tuple[int, int]) -> Image:
    """A part (x, y, w, h) of an image at the canvas' size (width, height)."""
    x, y, w, h = box
    interpolation = cv2.INTER_AREA if w > canvas[0] else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image[y : y + h, x : x + w], canvas, interpolation=interpolation), np.uint8)


class Images(Protocol):
    """A set of images of which some are drawn: a prepared classification set, or a folder."""

    @property
    def path(self) -> Path:
        """The file or folder."""

    def labels(self, split: str) -> NDArray[np.int64]:
        """One for each image of a split."""

    def image(self, split: str, index: int) -> Image:
        """An image, h×w×3."""


@dataclass(frozen=True)
class Negatives:
    """Draws training images without anybody.

    Attributes:
        share: of the draws that become one of them.
        images: small images without people, for mosaics, or None. split: of them.
        background: an image of a place without people, h×w×3, or None.
    """

    share: float
    images: Images | None = None
    split: str = "train"
    background: Image | None = None

    def identity(self) -> tuple[Any, ...]:
        """Plain values that are the same where the same images are drawn."""
        images = None
        if self.images is not None:
            there = self.images.path.stat()
            images = there.st_size, there.st_mtime_ns, self.split
        background = None if self.background is None else hashlib.sha256(self.background.tobytes()).hexdigest()
        return self.share, images, background

    def draw(
        self,
        rng: np.random.Generator,
        canvas: tuple[int, int],
        headless: Headless,
    ) -> Image:
        """One image of the canvas' size (width, height), H×W×3.

        Args:
            headless: finds a part of a training image without heads at the canvas' size, or None.
        """
        width, height = canvas
        kinds: list[tuple[float, Callable[[], Image | None]]] = [
            (PATTERN, lambda: pattern(rng, width, height)),
            (SHAPES, lambda: shapes(rng, self._ground(rng, canvas))),
            (HEADLESS, lambda: headless(rng, canvas)),
            (SCRAMBLED, lambda: self._scrambled(rng, headless(rng, canvas))),
            (DETAILED, lambda: self._detailed(rng, canvas, headless)),
        ]
        if self.images is not None:
            kinds.append((MOSAIC, lambda: mosaic(rng, width, height, lambda: self._small(rng))))
        if self.background is not None:
            kinds.append((BACKGROUND, lambda: self._empty_place(rng, canvas)))
        weights = np.array([weight for weight, _ in kinds])
        _, make = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
        drawn = make()
        return np.asarray(flat(rng, width, height), np.uint8) if drawn is None else drawn

    def _scrambled(self, rng: np.random.Generator, image: Image | None) -> Image | None:
        return None if image is None else scrambled(rng, image)

    def _detailed(self, rng: np.random.Generator, canvas: tuple[int, int], headless: Headless) -> Image | None:
        if self.images is None or rng.random() < 0.2:
            ground = headless(rng, canvas)
            return None if ground is None else detailed(rng, ground)
        side = int(max(canvas) * rng.uniform(1, 1.6))
        large = cv2.resize(self._small(rng), (side, side), interpolation=cv2.INTER_CUBIC)
        x, y = int(rng.integers(side - canvas[0] + 1)), int(rng.integers(side - canvas[1] + 1))
        return detailed(rng, np.asarray(large[y : y + canvas[1], x : x + canvas[0]], np.uint8))

    def _small(self, rng: np.random.Generator) -> Image:
        images = cast(Images, self.images)
        return images.image(self.split, int(rng.integers(len(images.labels(self.split)))))

    def _ground(self, rng: np.random.Generator, canvas: tuple[int, int]) -> Image:
        if self.images is not None and rng.random() < 0.3:
            small = cv2.resize(self._small(rng), canvas, interpolation=cv2.INTER_CUBIC)
            return np.asarray(small, np.uint8)
        return np.asarray(flat(rng, *canvas), np.uint8)

    def _empty_place(self, rng: np.random.Generator, canvas: tuple[int, int]) -> Image:
        image = cast(Image, self.background)
        height, width = image.shape[:2]
        return cut(image, random_box(rng, (width, height), canvas, longest=min(width, height)), canvas)
