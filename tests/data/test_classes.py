"""What is written into a classification set comes out again, whole or not at all; its items are fixed by the seed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import Counter

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from crowdexit.data.classes import FORMAT, ClassDataset, ClassStore, shifted, stratified, write_classes
from crowdexit.data.dataset import EpochPlan
from crowdexit.data.store import StoredSample, StoreError, open_for_writing, write_sample
from crowdexit.data.views import MEAN, STD

CLASSES = ["cat", "dög", "ship"]
WIDTH, HEIGHT = 40, 24


def some(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, HEIGHT, WIDTH, 3), np.uint8)


def fill(writer) -> None:
    """Six training images in two portions, two of test."""
    writer.add("train", some(4), [0, 1, 2, 0], ["t/0", "t/1", "t/2", "t/3"])
    writer.add("train", some(2, 1), [1, 2], ["t/5", "t/4"])
    writer.add("test", some(2, 2), [2, 2], ["t/0", "é"])


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new" / "set.h5"
    with write_classes(path, CLASSES, "made up") as writer:
        fill(writer)
    return path


def pixels(item: dict) -> np.ndarray:
    return (item["image"].numpy().transpose(1, 2, 0) * STD + MEAN) * 255


def test_round_trip(path):
    with ClassStore(path) as store:
        assert store.classes == CLASSES
        assert store.origin == "made up"
        assert store.size == (WIDTH, HEIGHT)
        assert store.splits() == ["train", "test"]
        assert store.ids("train") == ["t/0", "t/1", "t/2", "t/3", "t/5", "t/4"]
        assert store.ids("test") == ["t/0", "é"]
        assert store.labels("train").tolist() == [0, 1, 2, 0, 1, 2]
        for i, expected in enumerate([*some(4), *some(2, 1)]):
            np.testing.assert_array_equal(store.image("train", i), expected)
        assert store.describe().splitlines() == [
            "set.h5: 8 images of 40×24, 3 classes",
            "  train      6 images, 2 a class",
            "  test       2 images, 0 to 2 a class",
        ]
    assert [p.name for p in path.parent.iterdir()] == ["set.h5"]


def test_layout_is_the_documented_one(path):
    with h5py.File(path) as file:
        assert (file["train/images"].shape, file["train/images"].dtype) == ((6, HEIGHT, WIDTH, 3), np.uint8)
        assert (file["train/labels"].shape, file["train/labels"].dtype) == ((6,), np.int64)
        assert file["train/ids"].asstr()[0] == "t/0"
        own = {"format": FORMAT, "checksum": file.attrs["checksum"]}
        assert dict(file.attrs) == {"classes": '["cat", "d\\u00f6g", "ship"]', "origin": "made up", **own}
        assert not dict(file["train"].attrs)


@pytest.mark.parametrize("settings", [None, "some"])
def test_nothing_appears_before_it_is_whole(tmp_path, settings):
    path = tmp_path / "set.h5"
    with pytest.raises(KeyboardInterrupt), write_classes(path, CLASSES, "", settings=settings) as writer:  # noqa: PT012
        fill(writer)
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == (["set.h5.part"] if settings else [])


def interrupted(path, settings="some") -> None:
    with pytest.raises(KeyboardInterrupt), write_classes(path, CLASSES, "", settings=settings) as writer:  # noqa: PT012
        writer.add("train", some(2), [0, 1], ["a", "b"])
        raise KeyboardInterrupt


def test_an_interrupted_run_goes_on(tmp_path):
    path = tmp_path / "set.h5"
    interrupted(path)
    with h5py.File(tmp_path / "set.h5.part", "a") as file:  # as a kill leaves it, in the middle of the next portion
        file["train/images"].resize(5, axis=0)
        file["train/labels"].resize(3, axis=0)
        file["train/labels"][2] = 77
    with write_classes(path, CLASSES, "", settings="some") as writer:
        assert ("train", "a") in writer
        assert ("train", "c") not in writer
        assert ("val", "a") not in writer
        with pytest.raises(StoreError, match="duplicate id"):
            writer.add("train", some(1), [0], ["b"])
        writer.add("train", some(1, 1), [2], ["c"])
    with ClassStore(path) as store:
        assert store.ids("train") == ["a", "b", "c"]
        assert store.labels("train").tolist() == [0, 1, 2]
        np.testing.assert_array_equal(store.image("train", 2), some(1, 1)[0])
    assert [p.name for p in tmp_path.iterdir()] == ["set.h5"]


@pytest.mark.parametrize("spoil", ["settings", "none", "junk", "cut", "short"])
def test_what_cannot_be_gone_on_with_is_started_anew(tmp_path, spoil):
    path, part = tmp_path / "set.h5", tmp_path / "set.h5.part"
    interrupted(path)
    if spoil == "junk":
        part.write_bytes(b"junk" * 1000)
    elif spoil == "cut":
        part.write_bytes(part.read_bytes()[:3000])
    elif spoil == "short":
        with h5py.File(part, "a") as file:
            file["train/labels"].resize(1, axis=0)
    settings = {"settings": "others", "none": None}.get(spoil, "some")
    with write_classes(path, CLASSES, "", settings=settings) as writer:
        assert ("train", "a") not in writer
        fill(writer)
    assert len(ClassStore(path).ids("train")) == 6


def test_two_runs_into_one_file(tmp_path):
    with h5py.File(tmp_path / "set.h5.part", "w") as other:
        other["mine"] = 1
        script = (
            "import sys; from pathlib import Path; from crowdexit.data.classes import write_classes\n"
            "with write_classes(Path(sys.argv[1]), ['a', 'b'], ''): pass"
        )
        command = [sys.executable, "-c", script, tmp_path / "set.h5"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stderr.splitlines()[-1].endswith("another run is writing it")
        assert (tmp_path / "set.h5.part").is_file()


@pytest.mark.parametrize("settings", [None, "some"])
def test_every_class_needs_something_to_train_on(tmp_path, settings):
    message = "class 'cat' has no image to train on .nor have 1 other"
    path = tmp_path / "set.h5"
    with pytest.raises(StoreError, match=message), write_classes(path, CLASSES, "", settings=settings) as writer:  # noqa: PT012
        writer.add("train", some(1), [1], ["a"])
        writer.add("val", some(2), [0, 2], ["a", "b"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("dev", some(1), [0], ["a"]), "'dev'"),
        (("train", some(1).astype(np.float32), [0], ["a"]), "float32"),
        (("train", some(1)[..., 0], [0], ["a"]), "not n×H×W×3"),
        (("train", some(2), [0], ["a", "b"]), "2 images, 1 labels and 2 ids"),
        (("train", some(1), [0], []), "1 images, 1 labels and 0 ids"),
        (("train", some(1), [3], ["a"]), "3 classes"),
        (("train", some(1), [-1], ["a"]), "3 classes"),
        (("train", some(2), [0, 1], ["a", "a"]), "duplicate id"),
        (("val", some(1)[:, :20], [0], ["a"]), "40×20 among others"),
    ],
)
def test_what_may_not_be_added(tmp_path, arguments, message):
    with write_classes(tmp_path / "set.h5", CLASSES, "") as writer:
        fill(writer)
        with pytest.raises(StoreError, match=message):
            writer.add(*arguments)
    assert len(ClassStore(tmp_path / "set.h5").ids("train")) == 6


@pytest.mark.parametrize("classes", [[], ["one"], ["a", "a"], ["a", ""]])
def test_what_are_no_classes(tmp_path, classes):
    with pytest.raises(StoreError, match="two different class names"), write_classes(tmp_path / "set.h5", classes, ""):
        pass


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path, tmp_path / "file" / "set.h5"):
        with pytest.raises(StoreError), write_classes(path, CLASSES, "") as writer:
            fill(writer)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_travels_to_workers_unopened(path):
    store = ClassStore(path)
    store.ids("train")
    assert pickle.loads(pickle.dumps(store)).ids("train") == store.ids("train")


@pytest.mark.parametrize("content", [b"", b"no HDF5", "half"])
def test_no_store_at_all(path, content):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with pytest.raises(StoreError, match="not a readable HDF5 file"):
        ClassStore(path).splits()
    with pytest.raises(StoreError, match="no such prepared file"):
        ClassStore(path.with_name("missing.h5"))


def test_a_counting_set_is_not_one_of_classes(tmp_path):
    points = np.zeros((0, 2), np.float32)
    with open_for_writing(tmp_path / "set.h5") as file:
        write_sample(file, StoredSample("A", "train", np.zeros(9, np.uint8), points, width=8, height=8, count=0))
    with pytest.raises(StoreError, match="not a prepared classification set"):
        ClassStore(tmp_path / "set.h5").splits()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("labels", np.array([0, 1, 2, 3, 0, 0]), "train image 3 has the label 3, and there are 3 classes"),
        ("labels", np.array([0, -1, 2, 0, 0, 0]), "train image 1 has the label -1"),
        ("labels", np.zeros(5, np.int64), r"6 images, labels \(5,\)"),
        ("labels", np.zeros(6, np.float32), "float32"),
        ("labels", None, "not a prepared classification set"),
        ("ids", ["a"] * 7, r"ids \(7,\)"),
        ("images", some(6)[..., 0], "not N×H×W×3 uint8"),
        ("images", some(6).astype(np.int16), "not N×H×W×3 uint8"),
        ("images", some(6)[:, :10], "several sizes"),
    ],
)
def test_wrong_parts(path, name, value, message):
    with h5py.File(path, "a") as file:
        del file["train"][name]
        if value is not None:
            file["train"][name] = value
    with pytest.raises(StoreError, match=message):
        ClassStore(path).splits()


@pytest.mark.parametrize(
    ("classes", "message"),
    [("no JSON", "not a prepared"), ('"cat"', "not a list of names"), ("[1, 2]", "not a list"), (7, "not a prepared")],
)
def test_wrong_classes(path, classes, message):
    with h5py.File(path, "a") as file:
        file.attrs["classes"] = classes
    with pytest.raises(StoreError, match=message):
        ClassStore(path).splits()


def test_groups_where_arrays_should_be_and_no_split(path):
    with h5py.File(path, "a") as file:
        del file["test/images"]
        file.create_group("test/images")
    with pytest.raises(StoreError, match="not a prepared classification set"):
        ClassStore(path).splits()
    with h5py.File(path, "a") as file:
        del file["train"], file["test"]
    with pytest.raises(StoreError, match="holds no images"):
        ClassStore(path).splits()


def test_ids_that_are_no_text(path):
    with h5py.File(path, "a") as file:
        del file["train/ids"]
        file["train/ids"] = np.arange(6)
    with pytest.raises(StoreError, match="ids of train are damaged"):
        ClassStore(path).ids("train")


def test_what_is_not_there(path):
    store = ClassStore(path)
    for run_exit in (
        lambda: store.ids("val"),
        lambda: store.labels("dev"),
        lambda: ClassDataset(store, "val", size=(8, 8)),
    ):
        with pytest.raises(StoreError, match=r"no split .* \(it has train, test\)"):
            run_exit()
    for index in (-1, 6):
        with pytest.raises(StoreError, match="has no image"):
            store.image("train", index)


def test_items_are_the_stored_images(path):
    data = ClassDataset(ClassStore(path), "train", size=(WIDTH, HEIGHT))
    assert len(data) == len(list(data)) == 6
    item = data[4]
    assert (item["image"].shape, item["image"].dtype) == ((3, HEIGHT, WIDTH), torch.float32)
    np.testing.assert_allclose(pixels(item), some(2, 1)[0], atol=1e-3)
    assert (item["label"].dtype, item["label"].shape, item["label"].item()) == (torch.int64, (), 1)
    assert item["id"] == "t/5"
    assert torch.equal(data[4, 7]["image"], item["image"])  # without augmentation nothing is random


@pytest.mark.parametrize("size", [(20, 12), (80, 48), (32, 32)])
def test_items_have_the_size_asked_for(tmp_path, size):
    """An image red on the left and blue below stays so, however it is stretched."""
    image = np.zeros((1, HEIGHT, WIDTH, 3), np.uint8)
    image[:, :, : WIDTH // 2, 0] = 200
    image[:, HEIGHT // 2 :, :, 2] = 100
    with write_classes(tmp_path / "set.h5", ["a", "b"], "") as writer:
        writer.add("train", np.repeat(image, 2, 0), [0, 1], ["a", "b"])
    seen = pixels(ClassDataset(ClassStore(tmp_path / "set.h5"), "train", size=size)[1])
    width, height = size
    assert seen.shape == (height, width, 3)
    left, right, top, bottom = width // 4, 3 * width // 4, height // 4, 3 * height // 4
    np.testing.assert_allclose(seen[top, left], [200, 0, 0], atol=1)
    np.testing.assert_allclose(seen[bottom, left], [200, 0, 100], atol=1)
    np.testing.assert_allclose(seen[bottom, right], [0, 0, 100], atol=1)
    np.testing.assert_allclose(seen[top, right], [0, 0, 0], atol=1)


def test_shrunk_items_are_averages(path):
    """Every value counts: picking some of them would make fine patterns flicker."""
    seen = pixels(ClassDataset(ClassStore(path), "train", size=(WIDTH // 4, HEIGHT // 4))[0])
    expected = some(4)[0].reshape(HEIGHT // 4, 4, WIDTH // 4, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(seen, expected, atol=0.6)


def augmented(path, seed=0) -> ClassDataset:
    return ClassDataset(ClassStore(path), "train", size=(WIDTH, HEIGHT), augment=True, seed=seed)


def test_draws_are_fixed_by_the_seed(path):
    one, again, other = augmented(path), augmented(path), augmented(path, seed=1)
    keys = [(index, draw) for index in range(6) for draw in range(5)]
    images = {key: one[key]["image"] for key in keys}
    for key in reversed(keys):  # whatever was asked for before
        assert torch.equal(again[key]["image"], images[key])
    assert torch.equal(one[2]["image"], images[2, 0])
    assert any(not torch.equal(other[key]["image"], images[key]) for key in keys)
    assert len({images[0, draw].numpy().tobytes() for draw in range(5)}) > 1


def test_images_of_one_draw_are_shifted_differently(tmp_path):
    with write_classes(tmp_path / "set.h5", ["a", "b"], "") as writer:
        writer.add("train", np.repeat(some(1), 6, 0), [0, 1] * 3, list("abcdef"))
    data = augmented(tmp_path / "set.h5")
    assert len({data[index, 0]["image"].numpy().tobytes() for index in range(6)}) > 1


def test_shifted_images_are_crops_of_the_padded_one():
    image = some(1)[0]
    x_room, y_room = WIDTH // 8, HEIGHT // 8
    padded = np.empty((HEIGHT + 2 * y_room, WIDTH + 2 * x_room, 3), np.uint8)
    padded[:] = np.round(MEAN * 255)
    padded[y_room : y_room + HEIGHT, x_room : x_room + WIDTH] = image
    crops = {
        np.ascontiguousarray(padded[y : y + HEIGHT, x : x + WIDTH][:, ::step]).tobytes(): (x, y, step)
        for x in range(2 * x_room + 1)
        for y in range(2 * y_room + 1)
        for step in (1, -1)
    }
    rng = np.random.default_rng(0)
    found = [crops[np.ascontiguousarray(shifted(image, rng)).tobytes()] for _ in range(400)]
    xs, ys, steps = (Counter(values) for values in zip(*found, strict=True))
    assert set(xs) == set(range(2 * x_room + 1))
    assert set(ys) == set(range(2 * y_room + 1))
    assert 150 < steps[-1] < 250


def test_an_epoch_plan_and_workers(path):
    data = augmented(path)
    plan = EpochPlan(data.ids, seed=3)
    plan.set_epoch(1)
    expected = [data[key] for key in plan]
    assert sorted(item["id"] for item in expected) == sorted(data.ids)
    for workers in (0, 1):
        batches = list(DataLoader(data, batch_size=4, sampler=plan, num_workers=workers))
        assert torch.equal(torch.cat([b["image"] for b in batches]), torch.stack([i["image"] for i in expected]))
        assert torch.cat([b["label"] for b in batches]).tolist() == [i["label"].item() for i in expected]
        assert [id for b in batches for id in b["id"]] == [i["id"] for i in expected]


def test_stratified_keeps_every_share():
    labels = np.repeat([3, 0, 7], [50, 30, 20])[np.random.default_rng(1).permutation(100)]
    drawn = stratified(labels, 20)
    assert Counter(labels[drawn].tolist()) == {3: 10, 0: 6, 7: 4}
    assert np.array_equal(drawn, stratified(labels, 20))
    assert not np.array_equal(drawn, stratified(labels, 20, seed=1))
    # As prepared once; another draw would mix what was trained on with what was held back.
    assert np.flatnonzero(stratified(np.arange(40) % 4, 8)).tolist() == [9, 16, 18, 19, 22, 23, 24, 37]


@pytest.mark.parametrize(("size", "drawn"), [(0, [0, 0, 0]), (1, [1, 0, 0]), (3, [2, 1, 0]), (7, [4, 2, 1])])
def test_stratified_rounds_to_the_size_asked_for(size, drawn):
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    assert [int(stratified(labels, size)[labels == n].sum()) for n in range(3)] == drawn
