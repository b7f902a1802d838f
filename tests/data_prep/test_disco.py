"""DISCO folders in the published form, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import subprocess
import sys
import wave
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_matrix

from crowdexit.data.density import density_map
from crowdexit.data.log_mel import log_mel, read_audio
from crowdexit.data.store import Store
from data_prep import common, disco

WIDTH, HEIGHT = 320, 180


def prepare(*arguments, jobs=1) -> int:
    return common.run(disco.app, [*map(str, arguments), "--jobs", str(jobs)])


def add(source, split, id, image, heads, width=WIDTH, height=HEIGHT):
    """One id as published, and its heads in ``annotations``."""
    for folder in ("imgs", "auds", f"density/{split}", "annotations"):
        (source / folder).mkdir(parents=True, exist_ok=True)
    (source / "imgs" / f"{id}.jpg").write_bytes(image)
    savemat(source / "density" / split / f"{id}.mat", {"map": density_map(heads, height, width)})
    (source / "annotations" / f"GT_{id}.txt").write_text("".join(f"{x:.2f} {y:.2f}\n" for x, y in heads))
    audio = np.random.default_rng(len(heads)).normal(0, 3000, 48_000).astype(np.int16)
    with wave.open(str(source / "auds" / f"{id}.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(48_000)
        file.writeframes(audio.tobytes())


@pytest.fixture
def source(tmp_path, crowd_image):
    source = tmp_path / "DISCO"
    for split, id, heads in (
        ("train", "001", 4),
        ("train", "a_02", 5),
        ("val", "003", 6),
        ("test", "004", 0),
    ):
        add(source, split, id, *crowd_image(WIDTH, HEIGHT, heads))
    return source


def test_counts_from_heads_by_workers(source, tmp_path):
    """Through the true command, several processes and all."""
    target = tmp_path / "set.h5"
    command = [sys.executable, "-m", "data_prep.disco", source, target, "--jobs", "2", "--store-density"]
    done = subprocess.run([*command, "--heads", source / "annotations"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "set.h5: 4 images, 15 heads" in done.stdout
    assert "counts from heads: 4 images" in done.stdout
    store = Store(target)
    assert {split: store.counts(split) for split in store.splits()} == {
        "train": {"001": 4, "a_02": 5},
        "val": {"003": 6},
        "test": {"004": 0},
    }
    sample = store.read("val", "003")
    lines = (source / "annotations" / "GT_003.txt").read_text().split()
    np.testing.assert_allclose(sample.points, np.float32(lines).reshape(-1, 2) * 1024 / WIDTH, rtol=1e-5)
    assert Image.open(BytesIO(sample.image.tobytes())).size == (sample.width, sample.height) == (1024, 576)
    assert (sample.audio_source, sample.origin["count_from"]) == ("recorded", "heads")
    np.testing.assert_allclose(sample.log_mel, log_mel(*read_audio(source / "auds" / "003.wav")), atol=1e-5)
    np.testing.assert_allclose(sample.density, density_map(sample.points, 576, 1024, stride=8), atol=1e-6)


def test_counts_from_density(source, tmp_path, capsys):
    assert prepare(source, tmp_path / "set.h5") == 0
    assert "counts from density: 4 images" in capsys.readouterr().out
    store = Store(tmp_path / "set.h5")
    assert store.counts("train") == pytest.approx({"001": 4, "a_02": 5}, rel=1e-4)
    sample = store.read("val", "003")
    assert sample.points.shape == (0, 2)
    assert sample.density.shape == (72, 128)
    assert sample.density.sum() == pytest.approx(6, rel=1e-4)
    assert sample.origin["count_from"] == "density"


def test_ids_without_heads_fall_back(source, tmp_path, capsys):
    (source / "annotations" / "GT_003.txt").unlink()
    assert prepare(source, tmp_path / "set.h5", "--heads", source / "annotations") == 0
    out = capsys.readouterr().out
    assert "counts from heads: 3 images" in out
    assert "counts from density: 1 images" in out


@pytest.mark.parametrize("shape", [(1080, 1920), (576, 1024), (72, 128), (37, 91), (1, 1)])
def test_density_onto_grid_keeps_the_sum(shape):
    matrix = np.random.default_rng(0).uniform(0, 0.1, shape)
    grid = disco.onto_grid(matrix, 576, 1024)
    assert grid.shape == (72, 128)
    assert grid.sum(dtype=np.float64) == pytest.approx(matrix.sum(), rel=1e-5)
    if shape == (1080, 1920):
        np.testing.assert_allclose(grid, matrix.reshape(72, 15, 128, 15).sum(axis=(1, 3)), rtol=1e-4)


def test_another_shape_is_filled_up(tmp_path, crowd_image):
    """A square image keeps its shape: what it does not reach is black and has neither heads nor density."""
    source = tmp_path / "DISCO"
    image, _ = crowd_image(200, 200, 0)
    add(source, "test", "1", image, np.array([[100.0, 50.0], [199.9, 199.9]]), 200, 200)
    for target, options in (("heads", ["--heads", source / "annotations"]), ("density", [])):
        assert prepare(source, tmp_path / target, *options) == 0
    sample = Store(tmp_path / "heads").read("test", "1")
    np.testing.assert_allclose(sample.points, [[288, 144], [575.7, 575.7]], atol=0.1)
    pixels = np.asarray(Image.open(BytesIO(sample.image.tobytes())))
    assert pixels.shape == (576, 1024, 3)
    assert pixels[:, :570].mean() > 10 > pixels[:, 584:].max()
    density = Store(tmp_path / "density").read("test", "1").density
    assert density[:, 72:].sum() == 0
    assert density.sum() == pytest.approx(2, rel=1e-4)


def test_sparse_matrix_and_image_size(tmp_path, crowd_image):
    source = tmp_path / "DISCO"
    image, heads = crowd_image(1024, 576, 3)
    add(source, "val", "1", image, heads)
    savemat(source / "density/val/1.mat", {"map": csc_matrix(density_map(heads, 576, 1024).astype(float))})
    assert prepare(source, tmp_path / "set.h5") == 0
    sample = Store(tmp_path / "set.h5").read("val", "1")
    assert sample.count == pytest.approx(3, rel=1e-4)
    assert sample.image.tobytes() == image  # of the right size already: kept byte by byte


BROKEN = {
    "no audio": ("auds/001.wav", None, "no such audio file"),
    "cut sound": ("auds/001.wav", 0.5, "cut short"),
    "no image": ("imgs/001.jpg", None, "no image 001.jpg"),
    "cut image": ("imgs/001.jpg", 0.5, "001.jpg is damaged"),
    "no density": ("density/train/001.mat", None, "no density matrix"),
    "cut density": ("density/train/001.mat", 0.5, "001.mat is damaged"),
}


@pytest.mark.parametrize(("name", "share", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_samples_are_skipped_and_named(source, tmp_path, capsys, name, share, reason):
    if share is None:
        (source / name).unlink()
    else:
        whole = (source / name).read_bytes()
        (source / name).write_bytes(whole[: int(len(whole) * share)])
    assert prepare(source, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out
    assert "set.h5: 3 images" in out
    assert any("001: " in line and reason in line for line in out.splitlines()), out
    assert prepare(source, tmp_path / "strict.h5", "--strict") == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("matrix", [-np.ones((2, 2)), np.full((2, 2), np.nan), np.zeros((0, 0)), "text"])
def test_what_is_no_density(source, tmp_path, capsys, matrix):
    savemat(source / "density/train/001.mat", {"map": matrix})
    assert prepare(source, tmp_path / "set.h5") == 0
    assert "001: 001.mat holds a map" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1 2 3\n", "1 2\nx y\n", "1;2\n", "\x00\x01\xff"])
def test_what_are_no_heads(source, tmp_path, capsys, text):
    (source / "annotations/GT_001.txt").write_text(text)
    assert prepare(source, tmp_path / "set.h5", "--heads", source / "annotations") == 0
    assert "001: GT_001.txt" in capsys.readouterr().out


def test_mismatched_ids(source, tmp_path, capsys):
    """An id in two splits, heads twice for one id, and heads of an id that there is not."""
    (source / "density/val/001.mat").write_bytes((source / "density/train/001.mat").read_bytes())
    (source / "annotations/other_003.txt").write_text("1 1\n")
    (source / "annotations/GT_999.txt").write_text("1 1\n")
    assert prepare(source, tmp_path / "set.h5", "--heads", source / "annotations") == 0
    out = capsys.readouterr().out
    assert "001: density matrices in train and val" in out
    assert "003: head files GT_003.txt and other_003.txt" in out
    assert "GT_999: heads of an id" in out
    assert "set.h5: 2 images" in out


@pytest.mark.parametrize("missing", ["imgs", "auds", "density", "annotations"])
def test_missing_folder_is_one_line(source, tmp_path, capsys, missing):
    (source / missing).rename(tmp_path / "elsewhere")
    assert prepare(source, tmp_path / "set.h5", "--heads", source / "annotations") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_has_an_example(capsys):
    assert prepare("--help") == 0
    assert "Example: crowdexit prepare disco" in capsys.readouterr().out
