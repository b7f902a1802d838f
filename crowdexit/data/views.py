"""What a network sees of an image: fitted to its canvas, cut into tiles, normalised. NumPy and OpenCV alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.images.limits import MIN_SIDE, ImageError

TILES = 3  # along a side, at most
# An image that would shrink by more than this to fit is cut into tiles: its people would be lost.
LEAST_SCALE = 1 / 4
SCALE_STEP = 32  # of the sides of images that keep their own shape
MAX_TILES = 64
# Of a batch that goes through a stage, more would only take memory; and of all whose features are kept meanwhile.
PIXELS_PER_BATCH = 4 * 1024 * 768
PIXELS_IN_FLIGHT = 32 * 1024 * 768
# Of the tiles of one image: on a CPU several at once are no faster, and four take 1.3 GB where one takes 0.4.
TILE_PIXELS_PER_BATCH = 1024 * 768
# ImageNet's, which the published weights of all backbones expect.
MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)

Box = tuple[int, int, int, int]  # x, y, width, height
_Row = TypeVar("_Row", bound=tuple[Any, ...])


def checked_image(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image that comes as an array, as it is; a grey one (H×W or H×W×1) as RGB.

    Raises:
        ImageError: if it is of another shape or not of uint8, or smaller than 32 pixels a side.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.shape[2:] not in ((3,), (1,), ()):
        raise ImageError("an image is an array H×W×3 (RGB) or H×W (grey) of uint8")
    if image.ndim < 2:
        raise ImageError("an image is an array H×W×3 (RGB) or H×W (grey) of uint8")
    if image.shape[2:] != (3,):
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    if min(image.shape[:2]) < MIN_SIDE:
        raise ImageError(f"{image.shape[1]}×{image.shape[0]} is too small to count in ({MIN_SIDE} at least)")
    return image


@dataclass(frozen=True)
class Placement:
    """Where an image lies on a canvas: its pixel (x, y) is at (x, y) · scale + offset."""

    scale: float
    offset: tuple[int, int]
    size: tuple[int, int]  # (width, height) of the image as it lies there

    def points(self, points: NDArray[np.float32]) -> NDArray[np.float32]:
        """Heads of the image (N, 2) on the canvas."""
        return points * np.float32(self.scale) + np.asarray(self.offset, np.float32)

    def valid_mask(self, canvas: tuple[int, int], stride: int = 8) -> NDArray[np.float32]:
        """The share of each grid cell that is picture: (height/stride, width/stride)."""
        shares = []
        for axis in (1, 0):
            edges = np.arange(0, canvas[axis] + 1, stride)
            covered = np.clip(edges, self.offset[axis], self.offset[axis] + self.size[axis])
            shares.append(np.diff(covered) / stride)
        return np.outer(*shares).astype(np.float32)


def fit(image: NDArray[np.uint8], canvas: tuple[int, int]) -> tuple[NDArray[np.uint8], Placement]:
    """Scale an image into a canvas (width, height) without distortion: as large as fits, centred, edges grey.

    The offset is a multiple of 8, so that the image begins at a cell's border.
    """
    height, width = image.shape[:2]
    scale = min(canvas[0] / width, canvas[1] / height)
    size = (
        min(canvas[0], max(1, round(width * scale))),
        min(canvas[1], max(1, round(height * scale))),
    )
    offset = ((canvas[0] - size[0]) // 16 * 8, (canvas[1] - size[1]) // 16 * 8)
    if size != (width, height):
        interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        image = np.asarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)
    placement = Placement(scale, offset, size)
    return place(image, canvas, offset), placement


def tiles(image: NDArray[np.uint8], side: tuple[int, int]) -> list[NDArray[np.uint8]]:
    """TransCrowd's protocol: resize an image to whole views (width, height), three at most a side, and cut it.

    Along each side there are as many as come nearest to the image's own size, which is bent a little to fit them:
    1024×768 becomes 1152×768 and six tiles of 384×384, as in the official code. A smaller image becomes fewer tiles
    rather than larger people; of a larger one, and of one that is much longer than wide, the longer side has three.
    """
    height, width = image.shape[:2]
    scale = min(1.0, TILES * side[0] / width, TILES * side[1] / height)
    columns, rows = (max(1, round(scale * edge / of)) for edge, of in zip((width, height), side, strict=True))
    size = (columns * side[0], rows * side[1])
    shrinks = size[0] * size[1] < width * height
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized = np.asarray(cv2.resize(image, size, interpolation=interpolation), np.uint8)
    bands = [resized[r * side[1] : (r + 1) * side[1]] for r in range(rows)]
    return [band[:, c * side[0] : (c + 1) * side[0]] for band in bands for c in range(columns)]


def scaled_size(width: int, height: int, most: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) of an image scaled down, its shape kept, to no more pixels than ``most`` has; never up."""
    scale = min(1.0, math.sqrt(most[0] * most[1] / (width * height)))
    return max(1, round(width * scale)), max(1, round(height * scale))


def canvas_size(width: int, height: int, canvas: tuple[int, int], view: str) -> tuple[int, int]:
    """The (width, height) of the canvases of :func:`views`."""
    if view != "scale":
        return canvas
    across, down = scaled_size(width, height, canvas)
    return -(-across // SCALE_STEP) * SCALE_STEP, -(-down // SCALE_STEP) * SCALE_STEP


def scale_down(image: NDArray[np.uint8], most: tuple[int, int]) -> tuple[NDArray[np.uint8], Placement]:
    """An image of :func:`scaled_size` in the upper left corner of a canvas whose sides are multiples of 32."""
    height, width = image.shape[:2]
    size = scaled_size(width, height, most)
    if size != (width, height):
        image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
    return place(image, canvas_size(width, height, most, "scale"), (0, 0)), Placement(size[0] / width, (0, 0), size)


def image_rows(
    image: NDArray[np.uint8],
    native: tuple[int, int],
    canvas: tuple[int, int],
    view: Literal["fit", "tiles", "scale"],
) -> list[tuple[Box, tuple[NDArray[np.uint8], Placement]]]:
    """All rows that an image H×W×3 takes in a network's batch: the rectangle of each, its canvas, how it lies there.

    Args:
        native: (width, height) of an image that the network counts whole; a much larger one is cut into tiles.

    Raises:
        ImageError: if there are too many tiles.
    """
    boxes = tile_boxes(image.shape[1], image.shape[0], native)
    return [(box, row) for box in boxes for row in views(_cut_out(image, box), canvas, view)]


def is_tiled(rows: Sequence[tuple[Box, Any]]) -> bool:
    """Whether rows of an image show tiles of it, rather than all of it."""
    return len({box for box, _ in rows}) > 1


def _cut_out(image: NDArray[np.uint8], box: Box) -> NDArray[np.uint8]:
    x, y, width, height = box
    return image[y : y + height, x : x + width]


def views(
    image: NDArray[np.uint8], canvas: tuple[int, int], view: Literal["fit", "tiles", "scale"]
) -> list[tuple[NDArray[np.uint8], Placement]]:
    """All that a network with this canvas sees of a picture: one view with everything in it, or tiles to be added."""
    if view == "fit":
        return [fit(image, canvas)]
    if view == "scale":
        return [scale_down(image, canvas)]
    everywhere = Placement(1.0, (0, 0), canvas)
    return [(tile, everywhere) for tile in tiles(image, canvas)]


def same_size_groups(rows: Sequence[_Row], most: int) -> Iterator[list[_Row]]:
    """Rows, each a tuple that begins with its canvas, in their order: ``most`` together, with canvases of one size."""
    for _, alike in groupby(rows, key=lambda row: row[0].shape):
        group = list(alike)
        yield from (group[start : start + most] for start in range(0, len(group), most))


def tile_boxes(width: int, height: int, native: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """Cut an image into the fewest equal rectangles (x, y, w, h) of which none shrinks below a quarter.

    Raises:
        ImageError: if that makes more than 64.
    """
    columns = max(1, math.ceil(width * LEAST_SCALE / native[0]))
    rows = max(1, math.ceil(height * LEAST_SCALE / native[1]))
    if columns * rows > MAX_TILES:
        raise ImageError(
            f"{width}×{height} would need {columns * rows} tiles of {native[0]}×{native[1]} ({MAX_TILES} at most); "
            "shrink it or cut it into parts"
        )
    xs = [round(i * width / columns) for i in range(columns + 1)]
    ys = [round(i * height / rows) for i in range(rows + 1)]
    return [(xs[c], ys[r], xs[c + 1] - xs[c], ys[r + 1] - ys[r]) for r in range(rows) for c in range(columns)]


def place(image: NDArray[np.uint8], canvas: tuple[int, int], offset: tuple[int, int]) -> NDArray[np.uint8]:
    """Lay an image on a canvas (width, height) of the mean colour, which is zero once normalised."""
    height, width = image.shape[:2]
    if (width, height) == canvas:
        return image
    out = _ground(canvas).copy()
    out[offset[1] : offset[1] + height, offset[0] : offset[0] + width] = image
    return out


@lru_cache(maxsize=8)
def _ground(canvas: tuple[int, int]) -> NDArray[np.uint8]:
    """A canvas with nothing on it."""
    return np.full((canvas[1], canvas[0], 3), np.round(MEAN * 255), np.uint8)


def normalise(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """H×W×3 uint8 → 3×H×W float32 with ImageNet's mean and deviation."""
    return np.ascontiguousarray(normalised([image])[0])


def normalised(images: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """B images H×W×3 uint8 → B×3×H×W float32 with ImageNet's mean and deviation, channels last in memory."""
    out = np.empty((len(images), *images[0].shape), np.float32)
    for image, values in zip(images, out, strict=True):
        cv2.LUT(image, _NORMALISED, values)
    return out.transpose(0, 3, 1, 2)


# For each of the 256 bytes and each channel what it becomes; looking it up is several times as fast as computing it.
_NORMALISED = ((np.arange(256, dtype=np.float32)[:, None] - MEAN * 255) * (1 / (STD * 255)))[None]
