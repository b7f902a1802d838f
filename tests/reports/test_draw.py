"""Drawings keep the image's form, hide nothing where nobody is, and never fail on odd sizes or texts."""

from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray

from crowdexit.reports.draw import banner, bars, overlay
from crowdexit.results import ExitResult

Pixels = NDArray[np.uint8]


def grey(width: int, height: int, value: int = 128) -> Pixels:
    return np.full((height, width, 3), value, np.uint8)


def heads(*cells: tuple[int, int], mass: float = 0.5) -> NDArray[np.float32]:
    density = np.zeros((30, 40), np.float32)
    for row, column in cells:
        density[row, column] = mass
    return density


def test_overlay_leaves_empty_places_as_they_are_and_colours_people() -> None:
    image = grey(320, 240)
    drawn = overlay(image, heads((5, 30)))
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    assert (image == 128).all()  # the input stays
    # Cell (5, 30) covers the pixels around (44, 244); far from it nothing changes.
    assert np.abs(drawn[44, 244].astype(int) - 128).max() > 60
    assert (drawn[120:, :160] == 128).all()


@pytest.mark.parametrize("mass", [0.05, 0.5, 50.0])
def test_overlay_shows_a_sparse_and_a_dense_crowd_alike(mass: float) -> None:
    cells = [(r, c) for r in range(4, 26, 3) for c in range(4, 36, 3)]
    drawn = overlay(grey(320, 240), heads(*cells, mass=mass))
    reference = overlay(grey(320, 240), heads(*cells, mass=1.0))
    assert np.abs(drawn.astype(int) - reference.astype(int)).max() <= 2


def test_one_wild_cell_does_not_hide_the_crowd() -> None:
    cells = [(r, c) for r in range(4, 26, 2) for c in range(4, 36, 2)]
    density = heads(*cells)
    density[28, 38] = 5.0
    drawn = overlay(grey(320, 240), density)
    assert np.abs(drawn[80:160, 80:240].astype(int) - 128).max() > 60


def test_overlay_of_zero_density_is_the_image() -> None:
    image = grey(100, 60)
    assert (overlay(image, np.zeros((8, 12), np.float32)) == image).all()
    assert (overlay(image, np.full((8, 12), 1e-5, np.float32)) == image).all()
    assert (overlay(image, heads((5, 5)), strength=0) == image).all()


@pytest.mark.parametrize("shape", [(1, 1), (2, 300), (96, 128)])
def test_overlay_takes_any_grid_and_values(shape: tuple[int, int]) -> None:
    density = np.full(shape, 0.3, np.float32)
    density.flat[0] = np.nan
    assert overlay(grey(33, 500), density).shape == (500, 33, 3)


@pytest.mark.parametrize("size", [(32, 32), (64, 48), (320, 240), (1920, 1080), (48, 2000), (2000, 40)])
def test_banner_is_written_at_any_size(size: tuple[int, int]) -> None:
    image = grey(*size)
    out = banner(image, "About 136 people – street.jpg")
    assert out.shape == image.shape
    assert (image == 128).all()
    assert out.max() > 180  # letters
    assert (out < 60).any()  # strip
    assert (out[-max(4, size[1] // 8) :] == 128).all()  # the image below it is not touched


def test_banner_fits_the_width() -> None:
    out = banner(grey(640, 480), "a very long line of text that has to be made smaller, or it would be cut off " * 2)
    assert not (out[:, -3:] > 180).any()


def test_banner_writes_what_the_font_lacks_in_ascii() -> None:
    image = grey(900, 200)
    assert (banner(image, "café – 3×4 ±2 …\n“x”") == banner(image, 'cafe - 3x4 +-2 ... "x"')).all()
    assert (banner(image, "群 10") == banner(image, "? 10")).all()
    assert banner(image, "").shape == image.shape


def test_bars_have_one_row_for_each_exit() -> None:
    results = [ExitResult("V1", 120.2, (100.0, 150.0), 12.0), ExitResult("final", 136.0, None, 80.0)]
    figure = bars(results)
    left, right = figure.axes
    assert [p.get_width() for p in left.patches] == [120.2, 136.0]
    assert [p.get_width() for p in right.patches] == [12.0, 80.0]
    file = io.BytesIO()
    figure.savefig(file, format="png")
    assert file.getbuffer().nbytes > 1000


def test_bars_of_nothing_and_of_nobody() -> None:
    for results in ([], [ExitResult("V1", 0.0, None, 0.0)]):
        bars(results).savefig(io.BytesIO(), format="png")
