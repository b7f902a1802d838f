"""Prepared files with a byte changed: damage is told in one line, and nothing else is ever read in its place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest

from crowdexit.cli.main import app
from crowdexit.data.classes import ClassStore, write_classes
from crowdexit.data.store import CHECKSUMS, Store, StoredSample, StoreError, open_for_writing, write_sample
from crowdexit.utils import command

NOTHING = np.zeros((0, 2), np.float32)


def counting(path: Path) -> Path:
    random = np.random.default_rng(0)
    with open_for_writing(path) as file:
        for number in range(4):
            image, points = random.integers(0, 256, 80, np.uint8), random.uniform(0, 50, (4, 2)).astype(np.float32)
            split = "val" if number == 3 else "train"
            write_sample(
                file, StoredSample(f"A_{number}", split, image, points, 50, 40, 4.0, origin={"source": "x.jpg"})
            )
    return path


def classes(path: Path) -> Path:
    random = np.random.default_rng(0)
    with write_classes(path, ["red", "blue"], "made up") as writer:
        for split in ("train", "val"):
            writer.add(split, random.integers(0, 256, (4, 8, 8, 3), np.uint8), [0, 1, 0, 1], list("abcd"))
    return path


def all_of_counting(path: Path) -> str:
    with Store(path) as store:
        return repr(
            [vars(store.read(split, id, with_takes=True)) for split in store.splits() for id in store.ids(split)]
        )


def all_of_classes(path: Path) -> str:
    with ClassStore(path) as store:
        splits = {
            split: [
                (id, int(label), store.image(split, index).tolist())
                for index, (id, label) in enumerate(zip(store.ids(split), store.labels(split), strict=True))
            ]
            for split in store.splits()
        }
        return repr((store.classes, store.origin, splits))


KINDS = {"counting": (counting, all_of_counting), "classes": (classes, all_of_classes)}


@pytest.mark.parametrize(("make", "read"), KINDS.values(), ids=KINDS)
def test_a_changed_byte_anywhere_is_found(make: Callable[[Path], Path], read: Callable[[Path], str], tmp_path):
    path = make(tmp_path / "set.h5")
    data, expected, random = path.read_bytes(), read(path), np.random.default_rng(0)
    used = np.flatnonzero(np.frombuffer(data, np.uint8))  # most of the rest is room that nothing is in
    report = []
    for at in random.choice(used, 150):
        flipped = bytearray(data)
        flipped[at] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            assert read(path) == expected
        except StoreError as error:
            report.append(str(error))
    assert len(report) > 75
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in report)


def test_each_part_of_a_sample_has_its_checksum(tmp_path):
    path = counting(tmp_path / "set.h5")
    changes: dict[str, Any] = {
        "image": lambda group: group["image"].write_direct(np.zeros(80, np.uint8)),
        "points": lambda group: group["points"].write_direct(np.ones((4, 2), np.float32)),
        "its attributes": lambda group: group.attrs.modify("count", 5.0),
        "it has no checksum": lambda group: group.attrs.__delitem__(CHECKSUMS),
    }
    for part, change in changes.items():
        with h5py.File(counting(path), "r+") as file:
            change(file["train/A_1"])
        with Store(path) as store:
            assert store.read("train", "A_0").count == 4  # the others are read
            with pytest.raises(StoreError, match=rf"set\.h5: train/A_1 is damaged \(.*{part}"):
                store.read("train", "A_1")


def test_a_sample_that_has_gone_is_damage(tmp_path):
    path = counting(tmp_path / "set.h5")
    with h5py.File(path, "r+") as file:
        del file["train/A_1"]
    with pytest.raises(StoreError, match=r"the checksum of its list of samples does not match"):
        Store(path).ids("train")


def test_damage_ends_evaluation_with_one_line_and_code_2(tmp_path, capsys):
    path = counting(tmp_path / "set.h5")
    with h5py.File(path, "r+") as file:
        file["val/A_3/image"].write_direct(np.zeros(80, np.uint8))
    assert command.run(app, ["evaluate", "--data", str(path), "--split", "val", "--runtime", "eager"]) == 2
    assert f"error: {path}: val/A_3 is damaged (the checksum of 'image' does not match)" in capsys.readouterr().err


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size; skips where none can be mounted."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size={size} tmpfs '{folder}' 2>/dev/null"):
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        os.system(f"umount '{folder}'")


def test_full_disk_is_reported_and_written_rows_stay(tmp_path):
    with small_disk(tmp_path / "disk", "2m") as disk:
        path = disk / "set.h5"
        images = np.random.default_rng(0).integers(0, 256, (20, 64, 64, 3), np.uint8)

        def fill(portions: int, settings: str = "some") -> None:
            with write_classes(path, ["red", "blue"], "", settings=settings) as writer:
                for number in range(portions):
                    ids = [f"{number}/{n}" for n in range(20)]
                    if ("train", ids[0]) not in writer:
                        writer.add("train", images, [n % 2 for n in range(20)], ids)

        with pytest.raises(StoreError) as error:
            fill(99)
        line = str(error.value)
        assert line.startswith(f"{path}: the disk is full (")
        assert " MB needed, " in line
        kept = int(line.partition("; ")[2].split()[0])
        assert kept >= 20
        assert line.endswith(f"{kept} images are kept in set.h5.part; free some space, and the same command resumes it")
        fill(kept // 20)  # what is kept is whole, and needs no more room than there is
        with ClassStore(path) as store:
            assert len(store.ids("train")) == kept
            assert all(np.array_equal(store.image("train", n), images[n % 20]) for n in range(kept))


def test_a_disk_without_any_room(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "other").write_bytes(b"x" * 61440)
        with pytest.raises(StoreError, match=r"set\.h5: the disk is full \(.*nothing is kept"):
            classes(disk / "set.h5")


def test_where_no_room_can_be_taken_nothing_is_written(tmp_path, monkeypatch):
    """On every system: the file system refuses, and the free space is too little."""

    def refuse(*_: object) -> None:
        raise OSError("no room is reported of here")

    path = tmp_path / "set.h5"
    with pytest.raises(OSError, match="No space left on device"), open_for_writing(path) as file:  # noqa: PT012
        write_sample(file, StoredSample("A", "train", np.zeros(9, np.uint8), NOTHING, 8, 8, 0))
        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**5))
        write_sample(file, StoredSample("B", "train", np.zeros(9, np.uint8), NOTHING, 8, 8, 0))
    with h5py.File(tmp_path / "set.h5.part") as file:
        assert list(file["train"]) == ["A"]
