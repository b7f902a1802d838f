"""Density maps from head points: a small Gaussian a head, mass kept whole, made directly at any stride."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial import cKDTree

from crowdexit.errors import CrowdExitError

Kernel = Literal["gaussian", "adaptive", "points"]

# MCNN's and CSRNet's geometry-adaptive kernel: the spread is 0.3 of the mean distance to 3 neighbours,
# cut off at 4 of it (their scipy filter's habit). Heads at one place would have no spread at all.
_ADAPTIVE_SHARE, _ADAPTIVE_NEIGHBOURS, _ADAPTIVE_CUT, _SMALLEST_SIGMA = 0.3, 3, 4.0, 0.5

_CELLS_PER_CHUNK = 2**18  # of all windows together, which bounds the memory for thousands of heads


def split_inside(points: ArrayLike, height: int, width: int) -> tuple[NDArray[np.float32], int]:
    """The heads inside an image, and how many are not.

    ``points``: (N, 2), x y in pixels; inside means 0 <= x < width and 0 <= y < height, so NaN is outside.
    Returns the (M, 2) float32 inside points in their order, and N - M.

    Raises:
        CrowdExitError: if the points are not an N×2 array of numbers.
    """
    try:
        array = np.asarray(points, np.float64)
    except (TypeError, ValueError) as error:
        raise CrowdExitError("head points must be numbers, x y a head") from error
    if array.size == 0:
        return np.zeros((0, 2), np.float32), 0
    if array.ndim != 2 or array.shape[1] != 2:
        raise CrowdExitError(f"head points must be an N×2 array, not of shape {array.shape}")
    x, y = array.T
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    # As float32 a head a hair inside the right or lower border would come to lie on it.
    last = np.nextafter(np.array([width, height], np.float32), np.float32(0))
    return np.minimum(array[inside].astype(np.float32), last), int(len(array) - inside.sum())


def density_map(
    points: ArrayLike,
    height: int,
    width: int,
    *,
    kernel: Kernel = "gaussian",
    sigma: float = 4.0,
    size: int = 15,
    stride: int = 1,
) -> NDArray[np.float32]:
    """The density map of an image's heads; its sum is the number of heads inside the image.

    Each head is a Gaussian centred on the pixel its point falls in (the point rounded down, as the field
    does), cut to a square window; what the image's border cuts off is given back to the rest of the window,
    so that each head weighs exactly one (SL-ViT paper, IV: 15×15, sigma 4).

    Args:
        points: (N, 2), x y in pixels of the image; heads outside it are dropped (see ``split_inside``).
        height, width: the image's size in pixels.
        kernel: ``gaussian``, the same for all heads, or ``adaptive`` (Zhang et al., MCNN, CVPR 2016): sigma
            is 0.3 × the mean distance to the 3 nearest heads, the window reaches to 4 sigma. With fewer
            neighbours those that exist are taken; a lone head gets the fixed kernel. Or ``points``: each head in
            the one cell that it lies in, so that cells hold whole numbers.
        sigma: spread in pixels of the fixed kernel.
        size: side in pixels of the fixed kernel's window, odd.
        stride: side of a cell in pixels. The result is the sum over stride×stride blocks of the map at
            stride 1 (the last row and column of blocks may be cut by the image's border), made without it.

    Returns:
        (ceil(height / stride), ceil(width / stride)) float32.

    Raises:
        CrowdExitError: for a size, kernel or points that make no sense.
    """
    if height < 1 or width < 1 or stride < 1:
        raise CrowdExitError(f"no density map of {width}×{height} pixels at stride {stride}")
    if size < 1 or size % 2 == 0 or not sigma > 0:
        raise CrowdExitError(f"the kernel's side must be odd and its sigma above 0, not {size} and {sigma}")
    inside, _ = split_inside(points, height, width)
    shape = -(-height // stride), -(-width // stride)
    pixels = inside.astype(np.int64)  # towards zero, which is down for points inside
    if kernel == "points":
        counts = np.zeros(shape, np.float32)
        np.add.at(counts, tuple(pixels.T[::-1] // stride), 1)
        return counts
    if kernel == "gaussian":
        return _fixed(pixels, height, width, shape, sigma, size // 2, stride)
    if kernel == "adaptive":
        if len(inside) == 1:
            return _fixed(pixels, height, width, shape, sigma, size // 2, stride)
        return _adaptive(pixels, _adaptive_sigmas(inside), height, width, shape, stride)
    raise CrowdExitError(f"the kernel is {kernel!r}, not gaussian, adaptive or points")


def _fixed(
    pixels: NDArray[np.int64],
    height: int,
    width: int,
    shape: tuple[int, int],
    sigma: float,
    radius: int,
    stride: int,
) -> NDArray[np.float32]:
    """Many heads at once, all cells of all their windows."""
    # Float32 carries a few hundred heads well, and writing a large map in it takes half the time.
    density = np.zeros(shape, np.float32 if len(pixels) <= 500 and stride == 1 else np.float64)
    column, across = _axis_weights(pixels[:, 0], width, sigma, radius, stride)
    row, down = _axis_weights(pixels[:, 1], height, sigma, radius, stride)
    across, down = across.astype(density.dtype), down.astype(density.dtype)
    # Cells past the border weigh nothing and may lie anywhere on the map.
    columns = np.minimum(column[:, None] + np.arange(across.shape[1]), shape[1] - 1)
    rows = np.minimum(row[:, None] + np.arange(down.shape[1]), shape[0] - 1)
    chunk = max(1, _CELLS_PER_CHUNK // (columns.shape[1] * rows.shape[1]))
    for start in range(0, len(pixels), chunk):
        some = slice(start, start + chunk)
        cells = rows[some, :, None] * shape[1] + columns[some, None, :]
        weights = down[some, :, None] * across[some, None, :]
        np.add.at(density.reshape(-1), cells.reshape(-1), weights.reshape(-1))
    return density.astype(np.float32, copy=False)


def _adaptive(
    pixels: NDArray[np.int64],
    sigmas: NDArray[np.float64],
    height: int,
    width: int,
    shape: tuple[int, int],
    stride: int,
) -> NDArray[np.float32]:
    """Head by head, as each has its own window."""
    density = np.zeros(shape, np.float64)
    for pixel, sigma in zip(pixels, sigmas, strict=True):
        radius = int(_ADAPTIVE_CUT * sigma + 0.5)
        (column,), (across,) = _axis_weights(pixel[:1], width, sigma, radius, stride)
        (row,), (down,) = _axis_weights(pixel[1:], height, sigma, radius, stride)
        window = density[row : row + len(down), column : column + len(across)]
        window += np.outer(down[: window.shape[0]], across[: window.shape[1]])
    return density.astype(np.float32)


def _adaptive_sigmas(points: NDArray[np.float32]) -> NDArray[np.float64]:
    if len(points) == 0:
        return np.zeros(0)
    neighbours = min(_ADAPTIVE_NEIGHBOURS, len(points) - 1)
    # The nearest of all is the head itself.
    distances, _ = cKDTree(points).query(points, neighbours + 1)
    out: NDArray[np.float64] = np.maximum(_ADAPTIVE_SHARE * distances[:, 1:].mean(axis=1), _SMALLEST_SIGMA)
    return out


def _axis_weights(
    centres: NDArray[np.int64], length: int, sigma: float, radius: int, stride: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Along one axis: the first cell that each head's window touches (N,), its mass from there on (N, K)."""
    offsets = np.arange(-radius, radius + 1)
    # mass[i] is the kernel's mass before its i-th pixel; a cell's mass is a difference of two.
    mass = np.concatenate([[0.0], np.cumsum(np.exp(-(offsets**2) / (2 * sigma**2)))])
    start = centres[:, None] - radius
    touched = (2 * radius + stride - 1) // stride + 1
    first = np.maximum(start, 0) // stride
    cells = first + np.arange(min(touched, -(-length // stride)))
    low = np.clip(cells * stride - start, 0, 2 * radius + 1)
    high = np.clip(np.minimum((cells + 1) * stride, length) - start, 0, 2 * radius + 1)
    # Cells past the border have high < low: no mass.
    weights = mass[np.maximum(high, low)] - mass[low]
    return first[:, 0], weights / weights.sum(axis=1, keepdims=True)
