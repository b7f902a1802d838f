"""Views keep heads on the image and its people whole; conditions do what they say, to every channel."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdexit.data.augment import ConditionRange, Conditions, Degradations, View, random_view
from crowdexit.data.density import density_map

GREY = np.full((120, 160, 3), 128, np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.tuples(st.integers(32, 300), st.integers(32, 300)),
    canvas=st.sampled_from([(64, 64), (128, 64), (256, 256)]),
    scale=st.sampled_from([(1.0, 1.0), (0.3, 0.6), (0.75, 1.3), (2.0, 4.0)]),
)
def test_heads_stay_on_the_image(seed, size, canvas, scale):
    width, height = size
    image = np.zeros((height, width, 3), np.uint8)
    corners = [[0, 0], [np.nextafter(np.float32(width), 0), np.nextafter(np.float32(height), 0)]]
    points = np.concatenate([rng(seed).uniform((0, 0), size, (30, 2)), corners]).astype(np.float32)
    seen, moved, placement = random_view(image, points, View(canvas, (256, 128), scale), rng(seed))
    assert seen.shape == (canvas[1], canvas[0], 3)
    first, last = np.array(placement.offset), np.array(placement.offset) + placement.size
    assert (moved >= first).all()
    assert (moved < last).all()
    assert (last <= canvas).all()
    for stride in (1, 8):
        total = density_map(moved, canvas[1], canvas[0], stride=stride).sum()
        assert total == pytest.approx(len(moved), abs=1e-3)
    if scale[1] <= 1.0 and canvas == (256, 256):  # the whole image is there, and everybody on it
        assert len(moved) == len(points)


@pytest.mark.parametrize("flip", [False, True])
def test_heads_move_with_what_they_stand_on(flip):
    """A light square a head: wherever the view puts the heads, it is light there."""
    image = np.zeros((128, 256, 3), np.uint8)
    points = np.array([[40, 30], [200, 90], [130, 64]], np.float32)
    for x, y in points.astype(int):
        image[y - 6 : y + 6, x - 6 : x + 6] = 255
    mirrored = 0
    for seed in range(20):
        view = View((128, 128), (256, 128), (0.75, 1.3), flip=flip, jitter=0.0)
        seen, moved, _ = random_view(image, points, view, rng(seed))
        for x, y in moved.astype(int):
            near = seen[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2]
            assert near.max() > 200
        wide, _, _ = random_view(image, points, View((256, 128), (256, 128), (1.0, 1.0), flip, 0.0), rng(seed))
        mirrored += not np.array_equal(wide, image)
        if not np.array_equal(wide, image):
            assert np.array_equal(wide, image[:, ::-1])
    assert (0 < mirrored < 20) if flip else mirrored == 0


def test_jitter_moves_the_light_and_nothing_else():
    view = View((160, 120), (160, 120), (1.0, 1.0), flip=False, jitter=0.2)
    means = [random_view(GREY, np.zeros((0, 2), np.float32), view, rng(seed))[0].mean((0, 1)) for seed in range(40)]
    assert np.ptp(means, axis=0).min() > 20
    assert abs(np.mean(means) - 128) < 15


def test_brightness_scales_every_channel():
    image = rng().integers(0, 256, (50, 60, 3), np.uint8)
    dark = Conditions(brightness=0.25).apply(image, rng())
    np.testing.assert_allclose(dark, image * 0.25, atol=0.51)


@pytest.mark.parametrize("sigma", [25.0, 50.0])
def test_noise_is_gaussian_in_every_channel_and_its_own_in_each(sigma):
    noisy = Conditions(noise=sigma).apply(GREY, rng()).astype(float) - 128
    np.testing.assert_allclose(noisy.mean((0, 1)), 0, atol=sigma / 20)
    np.testing.assert_allclose(noisy.std((0, 1)), sigma, rtol=0.03)
    correlation = np.corrcoef(noisy.reshape(-1, 3).T)
    np.testing.assert_allclose(correlation, np.eye(3), atol=0.03)
    again = Conditions(noise=sigma).apply(GREY, rng(1))
    assert not np.array_equal(again, noisy + 128)


@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_black_covers_the_share_it_says_with_a_rectangle(share, seed):
    covered = Conditions(black=share).apply(GREY, rng(seed))
    black = (covered == 0).all(2)
    assert np.array_equal(black, (covered == 0).any(2)), "all channels"
    assert black.mean() == pytest.approx(share, abs=0.01)
    rows, columns = black.any(1), black.any(0)
    assert np.array_equal(black, np.outer(rows, columns))
    assert (covered[~black] == 128).all()
    assert (GREY == 128).all(), "the input stays"


def test_neutral_conditions_change_nothing():
    assert Conditions().apply(GREY, rng()) is GREY


def draws(wanted: ConditionRange, n: int = 2000) -> list[Conditions]:
    random = rng()
    return [wanted.draw(random) for _ in range(n)]


def test_conditions_are_drawn_as_described():
    drawn = draws(ConditionRange(share=0.5, brightness=(0.05, 0.5), noise=40, black=0.3))
    hit = [c for c in drawn if c != Conditions()]
    assert len(hit) / len(drawn) == pytest.approx(0.5, abs=0.04)
    dark = [c for c in hit if c.brightness < 1]
    assert len(dark) / len(hit) == pytest.approx(0.8, abs=0.04)
    assert all(0.05 <= c.brightness <= 0.5 and 0 <= c.noise <= 40 for c in dark)
    assert np.median([c.brightness for c in dark]) == pytest.approx(np.sqrt(0.05 * 0.5), rel=0.1)
    assert sum(c.black > 0 for c in dark) / len(dark) == pytest.approx(0.3, abs=0.05)
    assert all(0 < c.black <= 0.3 and c.noise == 0 for c in hit if c.brightness == 1)


def test_the_conditions_of_hu_et_al():
    light = draws(ConditionRange(share=1, dark=1, covered=0, brightness=(0, 0.2), noise=0))
    assert all(c.black == c.noise == 0 for c in light)
    assert np.mean([c.brightness for c in light]) == pytest.approx(0.1, abs=0.005)
    black = draws(ConditionRange(share=1, dark=0, black=0.3))
    assert all(c.brightness == 1 and c.noise == 0 for c in black)
    noise = draws(ConditionRange(share=1, dark=1, covered=0, brightness=(1, 1), noise=25))
    assert all(c.brightness == 1 and c.black == 0 for c in noise)
    assert max(c.noise for c in noise) > 24


PHOTO = np.asarray(np.linspace(20, 235, 64 * 96 * 3).reshape(64, 96, 3), np.uint8)
EACH = {name: Degradations(**{name: 1.0}) for name in ("tone", "grey", "cast", "dark", "blur", "noise", "jpeg")}


@pytest.mark.parametrize("name", EACH)
def test_every_degradation_is_seeded_and_leaves_the_input(name):
    image = np.asarray(rng(7).integers(0, 256, PHOTO.shape), np.uint8) // 4 + PHOTO // 2
    before = image.copy()
    for seed in range(5):
        spoiled = EACH[name].apply(image, rng(seed))
        assert spoiled.shape == image.shape
        assert spoiled.dtype == np.uint8
        assert not np.array_equal(spoiled, image)
        assert np.array_equal(spoiled, EACH[name].apply(image, rng(seed)))
    assert np.array_equal(image, before)


def test_what_the_degradations_do():
    def spread(name: str) -> list[np.ndarray]:
        return [EACH[name].apply(PHOTO, rng(seed)).astype(float) for seed in range(20)]

    assert all(np.ptp(image, axis=2).max() == 0 for image in spread("grey"))
    assert all(image.mean() < 0.55 * PHOTO.mean() + 5 for image in spread("dark"))
    ratios = np.array([image.mean((0, 1)) / PHOTO.mean((0, 1)) for image in spread("cast")])
    assert np.ptp(ratios, axis=1).max() > 0.2
    assert (abs(ratios - 1) < 0.21).all()
    assert all(image.std() < PHOTO.std() for image in spread("blur"))
    assert all(2 < (image - PHOTO).std() < 21 for image in spread("noise"))
    blue = np.full((64, 64, 3), (10, 20, 200), np.uint8)
    assert abs(EACH["jpeg"].apply(blue, rng()).astype(int) - blue).max() < 12, "the channels stay in their order"


def test_degradations_by_their_probabilities():
    some = Degradations(grey=0.2, cast=0.3)
    drawn = [some.apply(PHOTO, rng(seed)) for seed in range(400)]
    grey = sum(np.ptp(image, axis=2).max() == 0 for image in drawn)
    same = sum(np.array_equal(image, PHOTO) for image in drawn)
    assert (grey / 400, same / 400) == (pytest.approx(0.2, abs=0.06), pytest.approx(0.5, abs=0.08))
    assert Degradations().apply(PHOTO, rng()) is PHOTO


def test_degradations_leave_the_padding_alone():
    view = View((320, 256), (160, 120), (1.0, 1.0), flip=False, jitter=0.0, degradations=EACH["dark"])
    seen, _, placement = random_view(GREY, np.zeros((0, 2), np.float32), view, rng())
    outside = seen.astype(int).copy()
    (x, y), (w, h) = placement.offset, placement.size
    assert seen[y : y + h, x : x + w].mean() < 90
    outside[y : y + h, x : x + w] = seen[-1, -1] if (x, y) == (0, 0) else seen[0, 0]
    assert np.ptp(outside, axis=(0, 1)).max() == 0


def test_own_size_shrinks_only_large_images():
    view = View((64, 64), (200, 100), own_size=True)
    assert view.base_scale(100, 50) == 1
    assert view.base_scale(200, 100) == 1
    assert view.base_scale(800, 400) == pytest.approx(0.25)
    assert View((64, 64), (200, 100)).base_scale(100, 50) == 2


def test_a_mixture_of_scales_and_aspects():
    """Two marks a picture: how far they are apart across and down is the scale."""
    image = np.full((400, 400, 3), 128, np.uint8)
    points = np.array([[190, 190], [210, 190], [190, 210]], np.float32)

    def drawn(**keys) -> np.ndarray:
        view = View((2048, 2048), (400, 400), (0.6, 1.6), False, 0.0, own_size=True, **keys)
        moved = [random_view(image, points, view, rng(seed))[1] for seed in range(40)]
        return np.array([[m[1, 0] - m[0, 0], m[2, 1] - m[0, 1]] for m in moved]) / 20

    plain = drawn()
    assert plain.min() > 0.59
    assert plain.max() < 1.61
    np.testing.assert_allclose(plain[:, 0], plain[:, 1], rtol=0.01)
    wide = drawn(wide_share=0.5)[:, 0]
    assert np.mean((wide < 0.59) | (wide > 1.61)) == pytest.approx(
        0.5 * (1 - np.log(1.6 / 0.6) / np.log(4 / 0.3)), abs=0.15
    )
    assert wide.min() >= 0.29
    assert wide.max() <= 4.01
    aspects = np.divide(*drawn(aspect=0.08).T)
    assert 1.12 < aspects.max() < 1.18
    assert 0.85 < aspects.min() < 0.9
