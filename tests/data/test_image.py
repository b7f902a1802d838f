"""How an image is laid before a network: fitted whole, or cut into tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crowdexit.data.image import read_pixels
from crowdexit.data.views import tiles, views


def test_warnings_are_logged_where_pixels_alone_are_read(tmp_path, caplog):
    pages = [Image.new("RGB", (64, 48), colour) for colour in ("grey", "white")]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    assert read_pixels(tmp_path / "pages.tif").shape == (48, 64, 3)
    assert [f"{tmp_path / 'pages.tif'}: 2 pages in the file, only the first is counted"] == caplog.messages


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"),
    [(1024, 768, 3, 2), (768, 1024, 2, 3), (1920, 1080, 3, 2), (500, 500, 3, 3), (2000, 200, 3, 1), (90, 1000, 1, 3)],
)
def test_tiles_of_the_official_protocol(width, height, columns, rows):
    cut = tiles(np.zeros((height, width, 3), np.uint8), (32, 32))
    assert len(cut) == columns * rows
    assert {tile.shape for tile in cut} == {(32, 32, 3)}


@pytest.mark.parametrize(
    ("width", "height", "columns", "rows"), [(768, 432, 2, 1), (384, 384, 1, 1), (100, 900, 1, 2), (1000, 580, 3, 2)]
)
def test_small_images_are_not_enlarged(width, height, columns, rows):
    """By no more than a view's rounding: half of one."""
    assert len(tiles(np.zeros((height, width, 3), np.uint8), (384, 384))) == columns * rows


def test_tiles_put_together_are_the_image():
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    cut = tiles(image, (32, 32))
    rows = [np.concatenate(cut[r * 3 : r * 3 + 3], axis=1) for r in range(2)]
    assert np.array_equal(np.concatenate(rows), image)


@given(st.integers(32, 300), st.integers(32, 300))
def test_any_image_shape_is_accepted(width, height):
    image = np.full((height, width, 3), 200, np.uint8)
    seen = views(image, (64, 64), "tiles")
    assert 1 <= len(seen) <= 9
    assert all((canvas == 200).all() and placement.valid_mask((64, 64)).all() for canvas, placement in seen)
    ((canvas, placement),) = views(image, (64, 64), "fit")
    assert canvas.shape == (64, 64, 3)
    assert 0 < placement.valid_mask((64, 64)).mean() <= 1
