"""HDR images come back as the SDR images that they were made of."""

from __future__ import annotations

import numpy as np
import pytest
from hdr import LUMA, encode_hdr, linear

from crowdexit.data.hdr import to_sdr


def scene(height=48, width=64):
    """Smooth random colors of all brightnesses, sRGB."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 215, width)[None, :, None] * np.ones((height, 1, 3))
    return np.clip(ramp + rng.integers(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("white", [203, 100])
@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_an_sdr_image_comes_back(transfer, white):
    """At both reference whites; highlights excepted, which make room for what is brighter than white."""
    image = scene()
    image[:, -8:] = 255
    back = to_sdr(encode_hdr(image, transfer, white), transfer).astype(int)
    below = image.max(axis=2) < 220
    assert np.abs(back - image)[below].max() <= 6
    assert np.abs(back - image)[~below].max() <= 16
    assert (np.diff(back[:, :, 1].mean(axis=0)) > -8).all()


def test_highlights_roll_off_and_keep_their_hue():
    image = np.full((40, 40, 3), 60, np.uint8)
    signal = encode_hdr(image, "pq", 203)
    signal[:8, :8] = encode_hdr(np.full((8, 8, 3), [250, 200, 60], np.uint8), "pq", 2000)
    signal[:8, 8:16] = encode_hdr(np.full((8, 8, 3), [250, 200, 60], np.uint8), "pq", 8000)
    back = to_sdr(signal, "pq").astype(int)
    (red, green, blue), (brighter, *_) = back[4, 4], back[4, 12]
    assert red > green > blue
    assert 230 < red < brighter <= 255
    assert np.abs(back[20:] - 60).max() <= 2


def test_an_image_that_is_much_too_bright_is_darkened():
    """HLG in which white was put at the very top, five times too bright."""
    image = scene()
    image[:, -8:] = 255
    back = to_sdr(encode_hdr(image, "hlg", 1000), "hlg").astype(int)
    assert np.abs(back - image)[image.max(axis=2) < 220].max() <= 12


@pytest.mark.parametrize("primaries", ["bt709", "bt2020", "p3"])
def test_grey_stays_grey_whatever_the_primaries(primaries):
    image = np.repeat(np.repeat(np.arange(0, 200, 4, dtype=np.uint8)[None, :, None], 3, 2), 40, 0)
    image[:, 48:] = 255
    for transfer in ("pq", "hlg"):
        back = to_sdr(encode_hdr(image, transfer, 203), transfer, primaries).astype(int)
        assert np.ptp(back, axis=2).max() <= 2
        assert np.abs(back - image)[:, :48].max() <= 3
    assert sum(LUMA) == pytest.approx(1)
    assert linear(np.array([255]))[0] == 1


def test_bands_make_no_difference(monkeypatch):
    signal = encode_hdr(scene(), "hlg", 203)
    whole = to_sdr(signal, "hlg")
    monkeypatch.setattr("crowdexit.data.hdr._BAND", 200)
    np.testing.assert_array_equal(to_sdr(signal, "hlg"), whole)
