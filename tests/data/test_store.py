"""What is written into a prepared file is read back, and what is damaged says so."""

from __future__ import annotations

import pickle
from dataclasses import fields

import h5py
import numpy as np
import pytest

from crowdexit.data.classes import write_classes
from crowdexit.data.store import Store, StoredSample, StoreError, open_for_writing, write_sample


def sample(id="A_1", split="train", **changes) -> StoredSample:
    random = np.random.default_rng(0)
    values = {
        "image": random.integers(0, 256, 500, np.uint8),
        "points": random.uniform(0, 60, (3, 2)).astype(np.float32),
        "width": 80,
        "height": 60,
        "count": 3.0,
        "origin": {"source": "IMG_1.jpg"},
        **changes,
    }
    return StoredSample(id=id, split=split, **values)


def has_audio(**changes) -> StoredSample:
    log_mel = np.random.default_rng(1).normal(size=(96, 64)).astype(np.float32)
    return sample(
        log_mel=log_mel,
        audio_source="simulated",
        takes=np.stack([log_mel, log_mel]).astype(np.float16),
        density=np.ones((8, 10), np.float32),
        **changes,
    )


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new" / "set.h5"
    with open_for_writing(path) as file:
        write_sample(file, sample("A_1"))
        write_sample(file, sample("B_2", points=np.zeros((0, 2), np.float32), count=0))
        write_sample(file, has_audio(id="A_1", split="test"))
    return path


def test_round_trip(path):
    with Store(path) as store:
        assert store.splits() == ["train", "test"]
        assert store.ids("train") == ["A_1", "B_2"]
        assert store.ids("train", "B_*") == ["B_2"]
        assert store.counts("train") == {"A_1": 3, "B_2": 0}
        assert store.read("train", "B_2").points.shape == (0, 2)
        for expected in (sample("A_1"), has_audio(id="A_1", split="test")):
            found = store.read(expected.split, expected.id, with_takes=True)
            for field in fields(StoredSample):
                np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
        assert store.read("test", "A_1").takes is None


def test_travels_to_workers_unopened(path):
    store = Store(path)
    store.ids("train")
    assert pickle.loads(pickle.dumps(store)).ids("train") == ["A_1", "B_2"]


def test_a_sample_written_again_is_replaced(tmp_path):
    with open_for_writing(tmp_path / "set.h5") as file:
        write_sample(file, sample(count=1))
        write_sample(file, sample(count=2))
    assert Store(tmp_path / "set.h5").counts("train") == {"A_1": 2}


def test_nothing_appears_before_it_is_whole(tmp_path):
    path = tmp_path / "set.h5"
    with pytest.raises(StoreError), open_for_writing(path) as file:  # noqa: PT012
        write_sample(file, sample())
        write_sample(file, sample(split="dev"))
    assert not path.exists()
    with open_for_writing(path) as file:
        assert "A_1" in file["train"]
    assert [p.name for p in tmp_path.iterdir()] == ["set.h5"]


def test_a_damaged_part_is_started_anew(tmp_path):
    (tmp_path / "set.h5.part").write_bytes(b"junk" * 1000)
    with open_for_writing(tmp_path / "set.h5") as file:
        assert not list(file)


def test_cut_in_half(path):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StoreError):
        Store(path).splits()


@pytest.mark.parametrize("content", [b"", b"no HDF5"])
def test_no_store_at_all(tmp_path, content):
    (tmp_path / "set.h5").write_bytes(content)
    with pytest.raises(StoreError):
        Store(tmp_path / "set.h5").ids("train")
    with pytest.raises(StoreError):
        Store(tmp_path / "missing.h5")


def test_what_is_not_there(path):
    store = Store(path)
    for run_exit in (
        lambda: store.ids("val"),
        lambda: store.ids("train", "C_*"),
        lambda: store.read("train", "C_1"),
        lambda: store.read("val", "A_1"),
    ):
        with pytest.raises(StoreError):
            run_exit()


@pytest.mark.parametrize(
    ("name", "value"),
    [("points", np.zeros(5)), ("log_mel", np.zeros((64, 96))), ("image", None), ("points", None)],
)
def test_wrong_parts(path, name, value):
    with h5py.File(path, "a") as file:
        del file["test/A_1"][name]
        if value is not None:
            file["test/A_1"][name] = value
    with pytest.raises(StoreError):
        Store(path).read("test", "A_1")


def test_what_may_not_be_written(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for wrong in (sample(split="dev"), sample(audio_source="recorded"), has_audio(split="testing")):
            with pytest.raises(StoreError):
                write_sample(file, wrong)


def test_a_set_of_classes_is_not_for_counting(path, tmp_path):
    other = tmp_path / "classes.h5"
    with write_classes(other, ["red", "blue"], "made for a test") as writer:
        writer.add("train", np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 1]), ["a", "b"])
    with Store(other) as store, pytest.raises(StoreError, match="prepared for classification, not for counting"):
        store.counts("train")
    with h5py.File(path, "a") as file:
        del file["train"]["A_1"].attrs["count"]
    with Store(path) as store, pytest.raises(StoreError, match="train/A_1 lacks 'count'"):
        store.counts("train")
