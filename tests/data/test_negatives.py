"""Images without anybody: of the right shape, the same for the same seed, and with nobody in them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from crowdexit.data import negatives
from crowdexit.data.augment import Degradations, View
from crowdexit.data.dataset import CrowdDataset, Setting
from crowdexit.data.negatives import (
    PATTERNS,
    Negatives,
    cut,
    detailed,
    is_headless,
    mosaic,
    pattern,
    quilt,
    random_box,
    rephased,
    scrambled,
    shapes,
)
from crowdexit.data.store import Store, StoredSample, open_for_writing, write_sample

CANVAS = (96, 64)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


class Greys:
    """Three images of one grey each."""

    path: Path

    def labels(self, split: str) -> np.ndarray:
        return np.zeros(3, np.int64)

    def image(self, split: str, index: int) -> np.ndarray:
        return np.full((32, 32, 3), 60 * (index + 1), np.uint8)


@pytest.mark.parametrize("draw", PATTERNS)
def test_patterns(draw):
    for seed in range(5):
        drawn = draw(rng(seed), *CANVAS)
        assert drawn.shape == (64, 96, 3)
        assert np.isfinite(drawn).all()
        assert np.array_equal(drawn, draw(rng(seed), *CANVAS))
        assert not np.array_equal(drawn, draw(rng(seed + 100), *CANVAS))


def test_patterns_are_all_drawn_and_seeded():
    def one(seed: int) -> np.ndarray:
        return pattern(rng(seed), *CANVAS)

    images = [one(seed) for seed in range(80)]
    assert all(image.dtype == np.uint8 and image.shape == (64, 96, 3) for image in images)
    assert all(np.array_equal(image, one(seed)) for seed, image in enumerate(images))
    spread = np.array([image.std() for image in images])
    assert spread.min() < 30 < spread.max()


def test_shapes_leave_the_ground_as_it_was():
    ground = np.full((64, 96, 3), 90, np.uint8)
    drawn = [shapes(rng(seed), ground) for seed in range(8)]
    assert (ground == 90).all()
    assert all((image != 90).any() for image in drawn)
    assert np.array_equal(drawn[3], shapes(rng(3), ground))


def test_mosaics():
    random, images = rng(1), Greys()
    seen = set()
    for _ in range(6):
        drawn = mosaic(random, *CANVAS, lambda: images.image("train", int(random.integers(3))))
        assert drawn.shape == (64, 96, 3)
        seen |= set(np.unique(drawn))
    assert {60, 120, 180} <= seen


@pytest.fixture
def ground() -> np.ndarray:
    """A crowd's ground: dark on the left, light on the right, with a fine pattern over it."""
    image = np.tile(np.linspace(60, 180, 96)[None, :, None], (64, 1, 3)) + rng(3).normal(0, 6, (64, 96, 1))
    return image.astype(np.uint8)


def test_a_quilt_has_the_pixels_elsewhere(ground):
    drawn = quilt(rng(1), ground)
    assert drawn.shape == ground.shape
    assert not np.array_equal(drawn, ground)
    assert set(np.unique(drawn)) <= set(np.unique(ground))
    assert np.abs(drawn.mean(0) - ground.mean(0)).max() > 20, "its light does not fall from one side any more"


def test_moved_phases_keep_the_frequencies(ground):
    drawn = rephased(rng(1), ground)
    assert drawn.mean() == pytest.approx(ground.mean(), abs=2)
    assert drawn.std() == pytest.approx(ground.std(), rel=0.1)
    before, after = (np.abs(np.fft.rfft2(image[..., 0].astype(float))) for image in (ground, drawn))
    assert np.corrcoef(before.ravel()[1:], after.ravel()[1:])[0, 1] > 0.95
    assert np.abs(drawn.astype(float) - ground).mean() > 20


def test_scrambled_is_either_of_both(ground):
    made = [scrambled(rng(seed), ground) for seed in range(12)]
    assert all(image.shape == ground.shape and image.dtype == np.uint8 for image in made)
    values = set(np.unique(ground))
    assert 0 < sum(set(np.unique(image)) <= values for image in made) < 12


def test_detail_leaves_light_and_colours(ground):
    large = np.repeat(ground, 4, 0).repeat(4, 1)
    for seed in range(6):
        drawn = detailed(rng(seed), large)
        assert drawn.shape == large.shape
        assert not np.array_equal(drawn, large)
        assert drawn.mean((0, 1)) == pytest.approx(large.mean((0, 1)), rel=0.15)
        assert drawn[:, -96:].mean() > drawn[:, :96].mean() + 40


def test_what_tells_negatives_apart(tmp_path):
    images = Greys()
    images.path = tmp_path / "images"
    images.path.write_bytes(b"123")
    place = np.zeros((64, 96, 3), np.uint8)
    made = [Negatives(0.5), Negatives(0.6), Negatives(0.5, images), Negatives(0.5, background=place)]
    made += [Negatives(0.5, images, "test"), Negatives(0.5, background=place + 1)]
    assert len({negative.identity() for negative in made}) == len(made)
    assert Negatives(0.5, images).identity() == Negatives(0.5, images).identity()


@pytest.mark.parametrize("size", [(160, 96), (40, 300), (1024, 768), (60, 60)])
def test_boxes_lie_in_the_image_and_have_the_canvas_shape(size):
    for seed in range(40):
        x, y, w, h = random_box(rng(seed), size, CANVAS)
        assert 0 <= x <= x + w <= size[0]
        assert 0 <= y <= y + h <= size[1]
        assert w / h == pytest.approx(1.5, rel=0.06)
        part = cut(np.zeros((size[1], size[0], 3), np.uint8), (x, y, w, h), CANVAS)
        assert part.shape == (64, 96, 3)


def test_headless_keeps_its_distance():
    points = np.array([[50.0, 50.0]])
    assert not is_headless(points, (40, 40, 20, 20))
    assert not is_headless(points, (70, 40, 20, 20)), "a head is larger than its point"
    assert is_headless(points, (75, 40, 20, 20))
    assert is_headless(points[:0], (0, 0, 100, 100))


def test_kinds_as_often_as_they_are_there(monkeypatch):
    """Each kind paints a number of its own; without images or a background the others share."""
    names = {"pattern": 10, "shapes": 20, "mosaic": 30, "cut": 40, "scrambled": 70, "detailed": 80}
    for name, value in names.items():
        monkeypatch.setattr(negatives, name, lambda *_, value=value: np.full((64, 96, 3), value, np.uint8))

    def counts(wanted: Negatives, headless=lambda *_: np.full((64, 96, 3), 50, np.uint8)) -> Counter:
        random = rng()
        return Counter(int(wanted.draw(random, CANVAS, headless)[0, 0, 0]) for _ in range(2000))

    every = counts(Negatives(1.0, Greys(), background=np.zeros((64, 96, 3), np.uint8)))
    wanted = {10: 0.22, 20: 0.06, 30: 0.20, 40: 0.06, 50: 0.18, 70: 0.10, 80: 0.18}
    assert {kind: every[kind] / 2000 for kind in wanted} == pytest.approx(wanted, abs=0.03)
    alone = counts(Negatives(1.0))
    assert set(alone) == {10, 20, 50, 70, 80}
    assert alone[50] / 2000 == pytest.approx(0.18 / 0.74, abs=0.04)
    monkeypatch.setattr(negatives, "flat", lambda *_: np.full((64, 96, 3), 60.0))
    assert set(counts(Negatives(1.0), lambda *_: None)) == {10, 20, 60}, "none found: one colour"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Heads as white squares on dark images, left; and one image with a density map alone, white all over."""
    random = rng(0)
    with open_for_writing(tmp_path / "crowd.h5") as file:
        for i in range(4):
            points = random.uniform((5, 5), (100, 187), (6, 2)).astype(np.float32)
            pixels = np.full((192, 320, 3), 40, np.uint8)
            for x, y in points.astype(int):
                pixels[y - 4 : y + 5, x - 4 : x + 5] = 255
            density = None
            if i == 3:
                pixels[:], points, density = 255, points[:0], np.full((24, 40), 0.1, np.float32)
            image = cv2.imencode(".png", pixels)[1]
            audio = random.normal(size=(96, 64)).astype(np.float32)
            report = {"log_mel": audio, "audio_source": "simulated", "density": density}
            count = 6.0 if density is None else 96.0
            write_sample(file, StoredSample(f"A_{i}", "train", image, points, 320, 192, count, **report))
    return Store(tmp_path / "crowd.h5")


def dataset(store: Store, share: float, degradations: Degradations | None = None, seed: int = 0) -> CrowdDataset:
    view = View(CANVAS, (320, 192), jitter=0.0, degradations=degradations or Degradations())
    ids = [id for id in store.ids("train") if id != "A_3"]
    return CrowdDataset(store, "train", ids, Setting(CANVAS, view), seed, Negatives(share))


def test_parts_of_training_images_show_nobody(store):
    data = CrowdDataset(store, "train", store.ids("train"), Setting(CANVAS), 0)
    parts = [data._headless(rng(seed), CANVAS) for seed in range(20)]
    assert sum(part is not None for part in parts) > 10
    assert all((part == 40).all() for part in parts if part is not None)


def test_an_item_without_anybody(store):
    data = dataset(store, 1.0, Degradations(dark=1.0))
    for draw in range(12):
        item = data[0, draw]
        assert item["image"].shape == (3, 64, 96)
        assert item["density"].shape == item["valid_mask"].shape == (1, 8, 12)
        assert item["count"] == item["total"] == item["density"].sum() == 0
        assert item["valid_mask"].min() == 1
        assert not item["has_audio"], "its audio tells of people"
        assert item["log_mel"].std() > 0, "a batch normalisation only sees real audio"
        assert item["image"].mean() < 0, "degraded as the others are"


def test_negatives_take_a_share_of_the_draws_and_leave_the_rest(store):
    some, none = dataset(store, 0.3), dataset(store, 0.0)
    same = [torch.equal(some[0, draw]["image"], none[0, draw]["image"]) for draw in range(50)]
    assert same.count(False) / 50 == pytest.approx(0.3, abs=0.15)
    assert some[0, 0].keys() == some[0, same.index(False)].keys() == some[0, same.index(True)].keys()
    again = dataset(store, 0.3)
    assert all(torch.equal(some[1, draw]["image"], again[1, draw]["image"]) for draw in range(12))
    assert any(
        not torch.equal(some[1, draw]["image"], dataset(store, 0.3, seed=1)[1, draw]["image"]) for draw in range(12)
    )
