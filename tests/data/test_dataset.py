"""Items carry everybody and nothing else, whoever asks for them and when; a plan covers what it says."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crowdexit.data import dataset
from crowdexit.data.ambience import VoiceBank, simulate
from crowdexit.data.augment import ConditionRange, Conditions, View
from crowdexit.data.dataset import CrowdDataset, EpochPlan, Kernel, Setting
from crowdexit.data.negatives import Negatives
from crowdexit.data.store import Store, StoredSample, StoreError, open_for_writing, write_sample
from crowdexit.data.views import MEAN, STD, normalise, scale_down

CANVAS = (128, 128)


def written(path, **changes) -> Store:
    """One sample a split, 160×96, its left half light, with audio and two further takes."""
    random = np.random.default_rng(0)
    image = np.full((96, 160, 3), 60, np.uint8)
    image[:, :80] = 180
    values = {
        "image": cv2.imencode(".png", image)[1],
        "points": random.uniform((0, 0), (160, 96), (9, 2)).astype(np.float32),
        "width": 160,
        "height": 96,
        "count": 9.0,
        "log_mel": np.zeros((96, 64), np.float32),
        "audio_source": "simulated",
        "takes": np.stack([np.full((96, 64), take) for take in (1, 2)]).astype(np.float16),
        **changes,
    }
    with open_for_writing(path) as file:
        write_sample(file, StoredSample(id="A_1", split="train", **values))
    return Store(path)


def items(store: Store, setting: Setting, n: int, seed: int = 0) -> list[dict]:
    data = CrowdDataset(store, "train", ["A_1"], setting, seed)
    return [data[0, draw] for draw in range(n)]


def pixels(item: dict) -> np.ndarray:
    return (item["image"].numpy().transpose(1, 2, 0) * STD + MEAN) * 255


@pytest.fixture
def store(tmp_path):
    return written(tmp_path / "one.h5")


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("view", [None, View((64, 64), (128, 128)), View((256, 256), (128, 128), (0.5, 3.0))])
def test_density_sums_to_the_count(store, view, stride):
    setting = Setting(view.canvas if view else CANVAS, view, flip=True, stride=stride)
    for item in items(store, setting, 30):
        assert item["density"].sum().item() == pytest.approx(item["count"].item(), abs=1e-3)
        assert item["total"] == 9
        height, width = item["image"].shape[1:]
        assert item["density"].shape == (1, height // stride, width // stride)
        assert item["valid_mask"].shape == (1, height // 8, width // 8)
        if view is None:
            assert item["count"] == 9


def test_whole_images_are_mirrored_with_their_heads(tmp_path):
    points = np.array([[0, 10], [10, 50], [70, 90]], np.float32)  # all on the light half
    store = written(tmp_path / "left.h5", points=points, count=3.0)
    sides = Counter()
    for item in items(store, Setting(CANVAS, flip=True), 20):
        light = pixels(item)[60, 4, 0] > 120
        half = item["density"][0, :, :8] if light else item["density"][0, :, 8:]
        assert half.sum() > 2.7
        sides[bool(light)] += 1
    assert min(sides.values()) > 3
    assert all(pixels(item)[60, 4, 0] > 120 for item in items(store, Setting(CANVAS), 20))


@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("canvas", [(128, 128), (320, 192), (160, 96), (80, 64)])
def test_a_density_map_in_place_of_heads(tmp_path, canvas, stride):
    density = np.zeros((12, 20), np.float32)
    density[:, :10] = np.random.default_rng(0).uniform(0, 0.2, (12, 10))  # all on the light half
    count = float(density.sum())
    store = written(tmp_path / "map.h5", points=np.zeros((0, 2), np.float32), density=density, count=count)
    for item in items(store, Setting(canvas, flip=True, stride=stride), 12):
        width = canvas[0]
        light = pixels(item)[canvas[1] // 2, width // 8, 0] > 120
        map_ = item["density"][0]
        half = map_[:, : map_.shape[1] // 2] if light else map_[:, map_.shape[1] // 2 :]
        assert map_.sum().item() == pytest.approx(count, rel=1e-4)
        assert half.sum() > 0.93 * count
        assert item["count"] == pytest.approx(count)
        if canvas == (160, 96) and stride == 8:
            expected = density if light else density[:, ::-1]
            np.testing.assert_allclose(map_, expected, atol=1e-5)
    with pytest.raises(StoreError, match="A_1 has only a density map: it can only be shown whole"):
        items(store, Setting(canvas, View(canvas, canvas)), 1)


def test_audio_is_simulated_for_what_a_crop_shows(store, monkeypatch):
    """The heads in the crop, not those of the whole image; the same for the same draw; nobody in a negative."""
    time = np.arange(4_000) / 16_000
    voices = VoiceBank.of([np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in (150, 220, 310)])
    asked: list[float] = []

    def simulated(count, *others):
        asked.append(count)
        return simulate(count, *others)

    monkeypatch.setattr(dataset, "simulate", simulated)
    setting = Setting(CANVAS, View((64, 64), (160, 96)), voices=voices, hear=0.5)
    crops = items(store, setting, 40)
    assert asked == [item["count"].item() for item in crops]
    assert max(asked) >= 2
    assert 8 < sum(bool(item["has_audio"]) for item in crops) < 32
    for one, again in zip(crops, items(store, setting, 40), strict=True):
        assert torch.equal(one["log_mel"], again["log_mel"])
        assert one["has_audio"] == again["has_audio"]
    asked.clear()
    nobody = CrowdDataset(store, "train", ["A_1"], setting, negatives=Negatives(1.0))[0, 3]
    assert asked == [nobody["count"]] == [0]


def test_the_dark_has_images_without_people_too(store):
    setting = Setting(CANVAS, View((64, 64), (128, 128)), conditions=ConditionRange(share=1, dark=1, covered=0))
    data = CrowdDataset(store, "train", ["A_1"], setting, negatives=Negatives(1.0))
    light = CrowdDataset(store, "train", ["A_1"], replace(setting, conditions=Conditions()), negatives=Negatives(1.0))
    for draw in range(6):
        assert data[0, draw]["dark"]
        assert not light[0, draw]["dark"]
    assert np.mean([pixels(data[0, n]).mean() for n in range(6)]) < 0.7 * np.mean(
        [pixels(light[0, n]).mean() for n in range(6)]
    )


def test_conditions_leave_the_padding_alone(store):
    plain = items(store, Setting((128, 128)), 1)[0]
    conditions = Conditions(brightness=0.3, noise=30, black=0.2)
    for setting in (
        Setting((128, 128), conditions=conditions),
        Setting((128, 128), conditions=ConditionRange(share=1, dark=1, covered=1)),
    ):
        item = items(store, setting, 1)[0]
        padding = torch.nn.functional.interpolate(plain["valid_mask"][None], scale_factor=8)[0, 0] == 0
        assert padding.any()
        assert torch.equal(item["image"][:, padding], plain["image"][:, padding])
        assert not torch.equal(item["image"][:, ~padding], plain["image"][:, ~padding])


def test_valid_mask_is_where_the_image_lies(store):
    item = items(store, Setting((128, 128)), 1)[0]  # 160×96 fitted: 128×77 from row 24 on
    share = item["valid_mask"][0]
    assert share.sum().item() * 64 == pytest.approx(128 * 77)
    assert share[2].max() == 0
    assert share[3].min() == 1


def test_takes_are_drawn_in_training_alone(store):
    def taken(setting: Setting) -> Counter:
        return Counter(int(item["log_mel"].mean()) for item in items(store, setting, 60))

    assert set(taken(Setting(CANVAS, takes=True))) == {0, 1, 2}
    assert min(taken(Setting(CANVAS, takes=True)).values()) > 10
    assert taken(Setting(CANVAS)) == {0: 60}


def test_audio_dropout(store, tmp_path):
    def has_audio(hear: float, of: Store = store) -> int:
        found = items(of, Setting(CANVAS, hear=hear), 60)
        assert all(item["log_mel"].shape == (1, 96, 64) for item in found)
        return sum(bool(item["has_audio"]) for item in found)

    assert has_audio(1.0) == 60
    assert has_audio(0.0) == 0
    assert 15 < has_audio(0.5) < 45
    without_audio = written(tmp_path / "silent.h5", log_mel=None, takes=None, audio_source="none")
    assert has_audio(1.0, without_audio) == 0


def test_an_item_depends_on_seed_index_and_draw_alone(store):
    setting = Setting((64, 64), View((64, 64), CANVAS), takes=True, hear=0.5, conditions=ConditionRange(share=1))
    data = CrowdDataset(store, "train", ["A_1"], setting, 0)
    first = [data[0, draw] for draw in (3, 4)]
    np.random.seed(5)  # noqa: NPY002 (what others do to the global numbers must not matter)
    cv2.setRNGSeed(9)
    again = [data[0, draw] for draw in (4, 3)]
    for one, other in zip(first, again[::-1], strict=True):
        for key, value in one.items():
            assert torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
    assert not torch.equal(first[0]["image"], first[1]["image"])
    other_seed = CrowdDataset(store, "train", ["A_1"], setting, 1)[0, 3]
    assert not torch.equal(first[0]["image"], other_seed["image"])


def test_damaged_image(tmp_path):
    broken = written(tmp_path / "broken.h5", image=np.zeros(100, np.uint8))
    with pytest.raises(StoreError, match="train/A_1: the stored image is damaged"):
        items(broken, Setting(CANVAS), 1)


IDS = [f"A_{i}" for i in range(7)] + [f"B_{i}" for i in range(12)]


def test_plan_without_balance_is_every_sample_once():
    plan = EpochPlan(IDS, seed=3)
    epochs = []
    for epoch in range(2):
        plan.set_epoch(epoch)
        drawn = list(plan)
        assert sorted(index for index, _ in drawn) == list(range(19))
        epochs.append(drawn)
    assert [i for i, _ in epochs[0]] != [i for i, _ in epochs[1]], "another order"
    assert not {d for _, d in epochs[0]} & {d for _, d in epochs[1]}, "draws never come twice"
    plan.set_epoch(0)
    assert list(plan) == epochs[0]
    assert list(EpochPlan(IDS, seed=4)) != epochs[0]


def test_plan_keeps_the_balance():
    plan = EpochPlan(IDS, balance={"A_*": 0.35, "B_*": 0.65}, length=200)
    drawn = Counter(IDS[index] for index, _ in plan)
    assert sum(n for id, n in drawn.items() if id.startswith("A")) == 70
    assert drawn.total() == len(plan) == 200
    assert {n for id, n in drawn.items() if id.startswith("A")} == {10}
    assert {n for id, n in drawn.items() if id.startswith("B")} <= {10, 11}
    with pytest.raises(StoreError, match="no training sample matches 'C_\\*'"):
        EpochPlan(IDS, balance={"C_*": 1.0})


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 60),
    world=st.integers(1, 5),
    epoch=st.integers(0, 5),
    shares=st.lists(st.floats(0.1, 1), min_size=1, max_size=6),
)
def test_processes_share_the_plan(length, world, epoch, shares):
    ids = [f"{number}_{i}" for number in range(len(shares)) for i in range(3)]
    balance = {f"{number}_*": share for number, share in enumerate(shares)}
    parts = []
    for rank in range(world):
        plan = EpochPlan(ids, balance=balance, length=length, seed=1, rank=rank, world=world)
        plan.set_epoch(epoch)
        parts.append(list(plan))
        assert len(plan) == len(parts[-1])
    assert len({len(part) for part in parts}) == 1
    alone = EpochPlan(ids, balance=balance, length=length, seed=1)
    alone.set_epoch(epoch)
    whole = Counter(alone)
    assert whole.total() == length
    union = Counter(pair for part in parts for pair in part)
    assert set(union) == set(whole)
    assert union.total() - length == -length % world, "padded by no more than it takes"


def test_heads_as_points_are_whole_numbers(store):
    setting = Setting(CANVAS, View((64, 64), CANVAS, (1.0, 3.0)), kernel=Kernel("points"))
    for item in items(store, setting, 20):
        density = item["density"]
        assert torch.equal(density, density.round())
        assert density.sum() == item["count"]
    whole = items(store, Setting((160, 96), kernel=Kernel("points")), 1)[0]
    points = store.read("train", "A_1").points
    expected = np.zeros((12, 20))
    for x, y in points:
        expected[int(y // 8), int(x // 8)] += 1
    np.testing.assert_array_equal(whole["density"][0], expected)


@pytest.mark.parametrize(("most", "shape"), [((1024, 768), (96, 160)), ((100, 60), (64, 128))])
def test_own_shape_is_laid_out_as_counting_does(store, most, shape):
    """Scaled down to 6,000 pixels, 160×96 is 100×60, and a canvas of whole steps of 32 around it."""
    item = items(store, Setting(most, own_shape=True, kernel=Kernel("points")), 1)[0]
    laid, placement = scale_down(_decoded(store), most)
    assert item["image"].shape == (3, *shape)
    assert torch.equal(item["image"], torch.from_numpy(normalise(laid)))
    assert item["density"].shape == item["valid_mask"].shape == (1, shape[0] // 8, shape[1] // 8)
    assert torch.equal(item["valid_mask"][0], torch.from_numpy(placement.valid_mask((shape[1], shape[0]))))
    assert item["density"].sum() == item["count"] == 9


def _decoded(store: Store) -> np.ndarray:
    return cv2.imdecode(store.read("train", "A_1").image, cv2.IMREAD_COLOR_RGB)
