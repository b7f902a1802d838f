"""Fashion MNIST's four files in the published form, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import gzip
import struct
import subprocess
import sys

import numpy as np
import pytest

from crowdexit.data.classes import ClassStore
from data_prep import fashion_mnist

TRAIN, TEST = 60, 20


def idx(array: np.ndarray, magic: int | None = None, shape: tuple[int, ...] | None = None) -> bytes:
    """An idx file of unsigned bytes; what it declares may be wrong."""
    shape = array.shape if shape is None else shape
    return struct.pack(f">{1 + len(shape)}I", magic or 0x0800 + array.ndim, *shape) + array.tobytes()


def make_images(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 28, 28), np.uint8)


def labels(n: int) -> np.ndarray:
    return (np.arange(n) * 7 % 10).astype(np.uint8)


def published() -> dict[str, bytes]:
    return {
        "train-images-idx3-ubyte": idx(make_images(TRAIN, 1)),
        "train-labels-idx1-ubyte": idx(labels(TRAIN)),
        "t10k-images-idx3-ubyte": idx(make_images(TEST, 2)),
        "t10k-labels-idx1-ubyte": idx(labels(TEST)),
    }


@pytest.fixture
def source(tmp_path):
    source = tmp_path / "raw"
    source.mkdir()
    for name, data in published().items():
        (source / f"{name}.gz").write_bytes(gzip.compress(data))
    return source


def prepare(*arguments) -> int:
    return fashion_mnist.run(list(map(str, arguments)))


def error(capsys) -> str:
    """The one line that a refusal is."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "preparing" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("compressed", [True, False])
def test_whole_set(source, tmp_path, capsys, compressed):
    if not compressed:
        for name, data in published().items():
            (source / f"{name}.gz").unlink()
            (source / name).write_bytes(data)
    assert prepare(source, tmp_path / "set.h5") == 0
    assert capsys.readouterr().out.splitlines() == [
        "set.h5: 80 images of 28×28, 10 classes",
        "  train     50 images, 5 a class",
        "  val       10 images, 1 a class",
        "  test      20 images, 2 a class",
    ]
    store = ClassStore(tmp_path / "set.h5")
    assert store.classes[0] == "T-shirt/top"
    assert store.classes[9] == "Ankle boot"
    for split in store.splits():
        images, right = (
            (make_images(TEST, 2), labels(TEST)) if split == "test" else (make_images(TRAIN, 1), labels(TRAIN))
        )
        for index, id in enumerate(store.ids(split)):
            half, number = id.split("/")
            assert half == ("t10k" if split == "test" else "train")
            assert store.labels(split)[index] == right[int(number)]
            for channel in range(3):
                np.testing.assert_array_equal(store.image(split, index)[..., channel], images[int(number)])
    held_back, trained = set(store.ids("val")), set(store.ids("train"))
    assert not held_back & trained
    assert len(held_back | trained) == TRAIN
    # The same in every run: another draw would mix what was trained on with what was held back.
    assert store.ids("val")[:4] == ["train/00001", "train/00014", "train/00025", "train/00027"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "set.h5"]


def test_the_published_sizes_give_the_usual_split():
    right = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6000))
    val = fashion_mnist.stratified(right, len(right) // fashion_mnist.TRAIN_PER_VAL)
    assert np.bincount(right[val]).tolist() == [1000] * 10


IMAGES, LABELS = "train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
BROKEN = {
    "empty": (IMAGES, b"", "cut short in its first bytes"),
    "ends in the head": (IMAGES, published()[IMAGES][:15], "cut short in its first bytes"),
    "cut short": (IMAGES, published()[IMAGES][:-1], "declares 60 images and ends before the last"),
    "too long": (IMAGES, published()[IMAGES] + b"\0", "longer than the 60 images"),
    "labels cut short": (LABELS, published()[LABELS][:-1], "declares 20 labels and ends before the last"),
    "labels too long": (LABELS, published()[LABELS] + b"\0", "longer than the 20 labels"),
    "wrong magic": (IMAGES, idx(make_images(60, 1), magic=0x0D03), "begins 0x00000d03, not 0x00000803"),
    "little-endian": (LABELS, struct.pack("<2I", 0x0801, 20) + bytes(20), "no idx file of labels"),
    "labels for images": (IMAGES, published()[LABELS] + bytes(99), "no idx file of images"),
    "absurd": (IMAGES, idx(make_images(60, 1), shape=(2**32 - 1, 28, 28)), "declares 4,294,967,295 images"),
    "absurd sides": (IMAGES, idx(make_images(60, 1), shape=(60, 2**31, 2**31)), "images of 2147483648×2147483648"),
    "absurd labels": (LABELS, idx(labels(20), shape=(2**32 - 1,)), "declares 4,294,967,295 labels"),
    "other sides": (IMAGES, idx(make_images(60, 1), shape=(60, 14, 56)), "images of 56×14, not 28×28"),
    "none": (IMAGES, idx(make_images(0, 1)), "declares 0 images"),
    "an image too few": (IMAGES, idx(make_images(59, 1)), "train has 59 images and 60 labels"),
    "a label too many": (LABELS, idx(labels(21)), "t10k has 20 images and 21 labels"),
    "a label too large": (LABELS, idx(np.full(20, 10, np.uint8)), "labels 10 to 10 of 10 classes"),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("compressed", [True, False])
def test_a_broken_file_is_one_line(source, tmp_path, capsys, case, compressed):
    name, data, reason = BROKEN[case]
    (source / f"{name}.gz").unlink()
    (source / f"{name}{'.gz' * compressed}").write_bytes(gzip.compress(data) if compressed else data)
    assert prepare(source, tmp_path / "set.h5") == 2
    assert reason in error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("damage", ["half", "end", "bits", "no gzip", "missing"])
def test_damaged_compression_is_one_line(source, tmp_path, capsys, damage):
    path = source / f"{IMAGES}.gz"
    data = bytearray(path.read_bytes())
    if damage == "half":
        del data[len(data) // 2 :]
    elif damage == "end":
        del data[-3:]  # the image data are all there, but the check sum is not
    elif damage == "bits":
        data[1000] ^= 255
    elif damage == "no gzip":
        data = bytearray(published()[IMAGES])
    path.write_bytes(data)
    if damage == "missing":
        path.unlink()
    assert prepare(source, tmp_path / "set.h5") == 2
    reason = f"no file {path.name}" if damage == "missing" else f"{path.name} is damaged or cut short"
    assert reason in error(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


def test_ctrl_c_leaves_nothing(source, tmp_path, monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fashion_mnist, "coloured", stop)
    assert prepare(source, tmp_path / "set.h5") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; nothing was written"
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize(
    "arguments",
    [["nowhere", "set.h5"], [".", "set.h5"], [], ["raw", "folder"], ["raw", "text/set.h5"], ["raw", "a.h5", "--what"]],
)
def test_bad_input_is_one_line(source, tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("in the way")
    assert prepare(*arguments) == 2
    error(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "raw", "text"]


def test_through_the_true_command(source, tmp_path):
    command = [sys.executable, "-m", "data_prep.fashion_mnist", source, tmp_path / "set.h5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set.h5: 80 images")


def test_help_has_an_example(capsys):
    assert prepare("--help") == 0
    assert "Example: crowdexit prepare fashion-mnist" in capsys.readouterr().out
