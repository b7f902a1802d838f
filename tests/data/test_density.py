"""The density map keeps every head's mass, wherever it stands and whatever the cell size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from crowdexit.data.density import Kernel, density_map, split_inside
from crowdexit.errors import CrowdExitError

KERNELS: tuple[Kernel, Kernel] = ("gaussian", "adaptive")


@st.composite
def make_images(draw):
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    x, y = st.integers(0, 8 * width - 1), st.integers(0, 8 * height - 1)
    points = draw(st.lists(st.tuples(x, y), max_size=12))
    return np.array(points, np.float32).reshape(-1, 2) / 8, height, width


def blocks(density, stride):
    """Sums over stride×stride blocks, the plain way."""
    height, width = density.shape
    padded = np.zeros((-(-height // stride) * stride, -(-width // stride) * stride))
    padded[:height, :width] = density
    return padded.reshape(padded.shape[0] // stride, stride, -1, stride).sum(axis=(1, 3))


@settings(deadline=None, max_examples=60)
@given(make_images(), st.sampled_from(KERNELS), st.integers(1, 40))
def test_sum_and_blocks(image, kernel, stride):
    points, height, width = image
    full = density_map(points, height, width, kernel=kernel)
    coarse = density_map(points, height, width, kernel=kernel, stride=stride)
    assert full.shape == (height, width)
    assert full.dtype == coarse.dtype == np.float32
    assert full.min() >= 0
    assert full.sum(dtype=np.float64) == pytest.approx(len(points), rel=1e-4)
    np.testing.assert_allclose(coarse, blocks(full, stride), atol=1e-5)


@pytest.mark.parametrize("heads", [0, 1, 2, 3, 10_000])
@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("together", [False, True])
def test_sum_of_many(heads, stride, together):
    points = np.random.default_rng(heads).uniform((0, 0), (640, 360), (heads, 2))
    if together:
        points[:] = (639.5, 0.5)
    density = density_map(points, 360, 640, stride=stride)
    assert density.sum(dtype=np.float64) == pytest.approx(heads, rel=1e-4)


@pytest.mark.parametrize("corner", [(0, 0), (99, 0), (0, 59), (99, 59), (99.99, 59.99)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_corners_keep_their_mass(corner, kernel):
    density = density_map([corner], 60, 100, kernel=kernel)
    assert density.sum() == pytest.approx(1, rel=1e-4)
    row, column = np.unravel_index(density.argmax(), density.shape)
    assert (column, row) == (int(corner[0]), int(corner[1]))


def test_equals_the_papers_kernel_away_from_borders():
    impulse = np.zeros((61, 71))
    impulse[30, 40] = 1
    expected = gaussian_filter(impulse, 4, radius=7)
    np.testing.assert_allclose(density_map([(40.9, 30.2)], 61, 71), expected, atol=1e-7)


def test_adaptive_spread_follows_the_neighbours():
    heads = [(20, 20), (24, 20), (20, 24), (24, 24), (300, 200)]
    density = density_map(heads, 400, 600, kernel="adaptive")
    assert density[20, 20] > 20 * density[200, 300] > 0
    # Three neighbours at 4, 4 and 4√2 pixels: sigma 1.37, whose peak is 1 / (2 π sigma²).
    sigma = 0.3 * (8 + 32**0.5) / 3
    alone = density_map(heads[:4], 400, 600, kernel="adaptive")[20, 20]
    assert alone == pytest.approx(1 / (2 * np.pi * sigma**2), rel=0.05)


def test_adaptive_of_one_place():
    assert density_map([(5, 5)] * 6, 20, 20, kernel="adaptive").sum() == pytest.approx(6, rel=1e-4)
    np.testing.assert_array_equal(density_map([(5, 5)], 20, 20, kernel="adaptive"), density_map([(5, 5)], 20, 20))


def test_heads_outside_are_dropped_and_counted():
    points = [(0, 0), (9.99, 4.99), (10, 1), (1, 5), (-0.01, 1), (np.nan, 1), (np.inf, 1)]
    inside, outside = split_inside(points, 5, 10)
    assert outside == 5
    np.testing.assert_array_equal(inside, np.float32(points[:2]))
    assert density_map(points, 5, 10).sum() == pytest.approx(2, rel=1e-4)
    assert split_inside([], 5, 10)[0].shape == (0, 2)


def test_a_hair_inside_is_inside():
    inside, outside = split_inside([(np.nextafter(1024, 0), np.nextafter(768, 0))], 768, 1024)
    assert outside == 0
    assert (inside < (1024, 768)).all()


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0},
        {"stride": 0},
        {"size": 14},
        {"sigma": 0},
        {"kernel": "box"},
        {"points": [1, 2, 3]},
        {"points": [("a", "b")]},
    ],
)
def test_senseless_wishes(change):
    with pytest.raises(CrowdExitError):
        density_map(**{"points": [(1, 1)], "height": 9, "width": 9, **change})
