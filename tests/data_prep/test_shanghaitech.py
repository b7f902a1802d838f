"""ShanghaiTech folders in the published form, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import subprocess
import sys
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from crowdexit.data.store import Store
from data_prep import common, shanghaitech


def prepare(*arguments, jobs=1) -> int:
    return common.run(shanghaitech.app, [*map(str, arguments), "--jobs", str(jobs)])


def add(half, number, image, heads, truths="ground-truth"):
    """One image and its heads as published: image_info is a cell of a struct of location and number."""
    (half / "images").mkdir(parents=True, exist_ok=True)
    (half / truths).mkdir(exist_ok=True)
    (half / "images" / f"IMG_{number}.jpg").write_bytes(image)
    cell = np.empty((1, 1), object)
    cell[0, 0] = {"location": heads, "number": len(heads)}
    savemat(half / truths / f"GT_IMG_{number}.mat", {"image_info": cell})


@pytest.fixture
def source(tmp_path, crowd_image):
    """Both parts: A of images 1 to 9 in train_data and 1 in test_data, B of one image."""
    source = tmp_path / "ShanghaiTech"
    for number in range(1, 10):
        add(source / "part_A" / "train_data", number, *crowd_image(heads=number, seed=number))
    add(source / "part_A" / "test_data", 1, *crowd_image(heads=20), truths="ground_truth")
    add(source / "part_B" / "train_data", 7, *crowd_image(100, 75, heads=0))
    return source


def test_whole_set_by_workers(source, tmp_path):
    """Through the true command, several processes and all."""
    target = tmp_path / "out" / "set.h5"
    command = [sys.executable, "-m", "data_prep.shanghaitech", source, target, "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "set.h5: 11 images, 65 heads" in done.stdout
    store = Store(target)
    expected = {f"A_IMG_{n}": shanghaitech.split_of(f"A_IMG_{n}") for n in range(1, 10)}
    for split in ("train", "val"):
        ids = {id for id, s in {**expected, "B_IMG_7": shanghaitech.split_of("B_IMG_7")}.items() if s == split}
        assert set(store.counts(split) if ids else {}) == ids
    assert store.counts("test") == {"A_IMG_1": 20}
    sample = store.read("test", "A_IMG_1")
    assert sample.image.tobytes() == (source / "part_A/test_data/images/IMG_1.jpg").read_bytes()
    assert (sample.width, sample.height, sample.points.shape) == (96, 64, (20, 2))
    assert sample.log_mel is sample.density is None
    assert list(target.parent.iterdir()) == [target]


def test_validation_split_is_an_eighth_and_fixed():
    ids = [f"{part}_IMG_{n}" for part in "AB" for n in range(1, 401)]
    chosen = [id for id in ids if shanghaitech.split_of(id) == "val"]
    assert 80 <= len(chosen) <= 120
    assert chosen[:3] == ["A_IMG_2", "A_IMG_9", "A_IMG_16"]


@pytest.mark.parametrize(("name", "letter"), [("part_B_final", "B"), ("Part-A", "A"), ("pictures", "X")])
def test_one_part(tmp_path, crowd_image, name, letter):
    add(tmp_path / name / "test_data", 3, *crowd_image())
    assert prepare(tmp_path / name, tmp_path / "set.h5") == 0
    assert Store(tmp_path / "set.h5").ids("test") == [f"{letter}_IMG_3"]


@pytest.mark.parametrize("kernel", ["gaussian", "adaptive"])
def test_density_and_smaller_images(source, tmp_path, kernel):
    options = ["--store-density", "--kernel", kernel, "--max-side", 60]
    assert prepare(source / "part_A", tmp_path / "set.h5", *options) == 0
    sample = Store(tmp_path / "set.h5").read("test", "A_IMG_1")
    assert Image.open(BytesIO(sample.image.tobytes())).size == (sample.width, sample.height) == (60, 40)
    assert sample.density.shape == (5, 8)
    assert sample.density.sum() == pytest.approx(sample.count, rel=1e-4)
    assert prepare(source / "part_A", tmp_path / "large.h5") == 0
    large = Store(tmp_path / "large.h5").read("test", "A_IMG_1")
    np.testing.assert_allclose(sample.points, large.points * 60 / 96, rtol=1e-5)


def break_some(source):
    """What may go wrong with an image, each with a part of what the summary has to say of it."""
    half = source / "part_A" / "train_data"
    whole = (half / "images" / "IMG_1.jpg").read_bytes()
    (half / "images" / "IMG_1.jpg").write_bytes(whole[: len(whole) // 2])
    (half / "images" / "IMG_2.jpg").write_bytes(b"")
    (half / "images" / "IMG_3.jpg").unlink()
    (half / "ground-truth" / "GT_IMG_4.mat").unlink()
    mat = (half / "ground-truth" / "GT_IMG_5.mat").read_bytes()
    (half / "ground-truth" / "GT_IMG_5.mat").write_bytes(mat[: len(mat) // 2])
    savemat(half / "ground-truth" / "GT_IMG_6.mat", {"image_info": np.zeros((3, 3))})
    savemat(half / "ground-truth" / "GT_IMG_7.mat", {"other": 1})
    return {
        "A_IMG_1": "IMG_1.jpg is damaged",
        "A_IMG_2": "IMG_2.jpg is damaged",
        "A_IMG_3": "no image IMG_3.jpg",
        "A_IMG_4": "no file GT_IMG_4.mat",
        "A_IMG_5": "GT_IMG_5.mat is damaged",
        "A_IMG_6": "field location, or one array N×2; found image_info 3×3",
        "A_IMG_7": "'image_info'",
    }


def test_broken_samples_are_skipped_and_named(source, tmp_path, capsys):
    broken = break_some(source)
    assert prepare(source, tmp_path / "set.h5") == 0
    out = capsys.readouterr().out
    assert "set.h5: 4 images" in out
    assert "7 samples skipped" in out
    for id, reason in broken.items():
        assert any(id in line and reason in line for line in out.splitlines()), (id, out)


def test_strict_stops(source, tmp_path, capsys):
    (source / "part_A/train_data/images/IMG_5.jpg").unlink()
    assert prepare(source, tmp_path / "set.h5", "--strict") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: A_IMG_5: no image IMG_5.jpg"
    assert not (tmp_path / "set.h5").exists()


def test_heads_outside_are_dropped_and_counted(tmp_path, crowd_image, capsys):
    image, _ = crowd_image()
    add(tmp_path / "part_A/test_data", 1, image, np.array([[5, 5], [95.9, 63.9], [96, 5], [-1, 5.0]]))
    assert prepare(tmp_path, tmp_path / "set.h5") == 0
    assert Store(tmp_path / "set.h5").counts("test") == {"A_IMG_1": 2}
    assert "2 heads outside their images dropped" in capsys.readouterr().out


def interrupt(monkeypatch, source, target, *options):
    """A run that Ctrl-C ends after four samples."""
    made = []

    def make(task, **settings):
        if len(made) == 4:
            raise KeyboardInterrupt
        made.append(task.id)
        return original(task, **settings)

    original = shanghaitech.make_sample
    with monkeypatch.context() as patch:
        patch.setattr(shanghaitech, "make_sample", make)
        assert prepare(source, target, *options) == 130
    assert not target.exists()


def test_interrupted_run_goes_on(source, tmp_path, monkeypatch, capsys):
    target = tmp_path / "set.h5"
    interrupt(monkeypatch, source, target)
    # Nothing of what was done is done again, not even with the images gone.
    (source / "part_A/train_data/images/IMG_2.jpg").unlink()
    assert prepare(source, target) == 0
    out = capsys.readouterr().out
    assert "4 images resumed" in out
    assert "set.h5: 11 images" in out


@pytest.mark.parametrize("spoil", ["settings", "file"])
def test_what_cannot_be_gone_on_with_is_started_anew(source, tmp_path, monkeypatch, capsys, spoil):
    target, options = tmp_path / "set.h5", []
    interrupt(monkeypatch, source, target)
    if spoil == "settings":
        options = ["--max-side", 40]
    else:
        part = tmp_path / "set.h5.part"
        part.write_bytes(part.read_bytes()[:3000])
    assert prepare(source, target, *options) == 0
    assert "resumed" not in capsys.readouterr().out
    assert Store(target).read("test", "A_IMG_1").width == (40 if options else 96)


def test_killed_run_goes_on(source, tmp_path, capsys):
    """SIGKILL, with no time to tidy up: a child kills itself while it makes its fifth sample."""
    script = (
        "import os, signal, sys\nfrom data_prep import common, shanghaitech\n"
        "original, made = shanghaitech.make_sample, []\n"
        "def make(task, **settings):\n"
        "    made.append(1)\n"
        "    return original(task, **settings) if len(made) < 5 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "shanghaitech.make_sample = make\n"
        "common.run(shanghaitech.app, sys.argv[1:])\n"
    )
    target = tmp_path / "set.h5"
    killed = subprocess.run([sys.executable, "-c", script, source, target, "--jobs", "1"], check=False)
    assert killed.returncode == -9
    assert prepare(source, target) == 0
    out = capsys.readouterr().out
    assert "4 images resumed" in out
    assert "set.h5: 11 images" in out


def test_nothing_usable(tmp_path, crowd_image, capsys):
    add(tmp_path / "part_A/train_data", 1, b"no picture", np.zeros((1, 2)))
    assert prepare(tmp_path, tmp_path / "out" / "set.h5") == 2
    assert "no sample could be prepared" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nowhere", "set.h5"],
        [".", "set.h5"],
        [],
        [".", "set.h5", "--kernel", "box"],
        [".", "set.h5", "--what"],
        ["source", "folder"],
        ["source", "file/set.h5"],
        ["twice", "set.h5"],
        ["part_C", "set.h5"],
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, crowd_image, arguments):
    monkeypatch.chdir(tmp_path)
    add(tmp_path / "source/part_A/train_data", 1, *crowd_image())
    for part in ("twice/part_A/train_data", "twice/part_A_final/train_data", "part_C/train_data", "folder"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "file").write_text("in the way")
    assert prepare(*arguments) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line and "preparing" not in line]
    assert len(error) == 1
    assert error[0].startswith("error: ")


def test_help_has_an_example(capsys):
    assert prepare("--help") == 0
    assert "Example: crowdexit prepare shanghaitech" in capsys.readouterr().out
