"""Class folders on the disk and in archives, whole and broken, through the command to the prepared file."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from crowdexit.data.classes import ClassStore
from data_prep import class_folders, common, labelled


def prepare(*arguments) -> int:
    return common.run(class_folders.app, list(map(str, arguments)))


def error(capsys) -> str:
    """The one line that a refusal is."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "preparing" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def noise(seed: int, width: int = 40, height: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path, pixels, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def archived(folder, path, arcname="."):
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname)
    return path


@pytest.fixture
def halves(tmp_path):
    """train and test: two classes with twelve images to train on and one to test, as PNG so that values stay."""
    source = tmp_path / "set"
    for label, name in enumerate(("cat", "dog")):
        for number in range(12):
            save(source / "train" / name / f"{number:02d}.png", noise(100 * label + number))
        save(source / "test" / name / "00.png", noise(100 * label + 50))
    return source


@pytest.fixture
def plain(tmp_path):
    """Class folders alone: two classes of thirty images."""
    source = tmp_path / "plain"
    for label, name in enumerate(("cat", "dog")):
        for number in range(30):
            save(source / name / f"{number:02d}.png", noise(100 * label + number))
    return source


def everything(path) -> dict[str, tuple[str, int, bytes]]:
    """Of every image by its id: split, label, values."""
    with ClassStore(path) as store:
        return {
            id: (split, int(store.labels(split)[i]), store.image(split, i).tobytes())
            for split in store.splits()
            for i, id in enumerate(store.ids(split))
        }


def test_train_and_test_folders(halves, tmp_path, capsys):
    assert prepare(halves, tmp_path / "set.h5", "--size", 40) == 0
    found = everything(tmp_path / "set.h5")
    assert len(found) == 26
    for id, (split, label, values) in found.items():
        half, name, number = id.removesuffix(".png").split("/")
        assert label == ["cat", "dog"].index(name)
        assert split == ("test" if half == "test" else class_folders.split_of(id, 0.1))
        assert values == noise(100 * label + (50 if half == "test" else int(number))).tobytes()
    splits = [split for split, _, _ in found.values()]
    assert splits.count("val") > 0
    store = ClassStore(tmp_path / "set.h5")
    assert store.classes == ["cat", "dog"]
    assert store.origin == "class folders of set"
    assert store.ids("train") == sorted(store.ids("train"))
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "set.h5: 26 images of 40×40, 2 classes"
    assert out[-1] == "  test       2 images, 1 a class"
    assert not (tmp_path / "set.h5.part").exists()


def test_classes_alone(plain, tmp_path):
    assert prepare(plain, tmp_path / "set.h5", "--size", 40, "--val", 0.2) == 0
    found = everything(tmp_path / "set.h5")
    assert len(found) == 60
    assert {id: split for id, (split, _, _) in found.items()} == {
        id: class_folders.split_of(id, 0.2, test=True) for id in found
    }
    assert {split for split, _, _ in found.values()} == {"train", "val", "test"}


def test_split_is_a_share_and_fixed():
    ids = [f"train/{name}/{n:04d}.jpg" for name in ("cat", "dog") for n in range(1000)]
    val = {id for id in ids if class_folders.split_of(id, 0.1) == "val"}
    for name in ("cat", "dog"):
        assert 80 <= sum(name in id for id in val) <= 120
    assert sorted(val)[:3] == ["train/cat/0012.jpg", "train/cat/0024.jpg", "train/cat/0031.jpg"]
    # With test images too the validation part is the same, and they are as many.
    both = {id: class_folders.split_of(id, 0.1, test=True) for id in ids}
    assert {id for id, split in both.items() if split == "val"} == val
    assert 160 <= sum(split == "test" for split in both.values()) <= 240


def test_a_val_folder_is_taken_as_it_is(halves, tmp_path):
    save(halves / "val" / "dog" / "x.png", noise(7))
    assert prepare(halves, tmp_path / "set.h5", "--size", 40) == 0
    found = everything(tmp_path / "set.h5")
    assert [id for id, (split, _, _) in found.items() if split == "val"] == ["val/dog/x.png"]
    assert sum(split == "train" for split, _, _ in found.values()) == 24


@pytest.mark.parametrize("arcname", [".", "", "imagenet", "a/b"])
@pytest.mark.parametrize("kind", ["halves", "plain"])
def test_an_archive_gives_the_same(tmp_path, request, kind, arcname):
    source = request.getfixturevalue(kind)
    path = tmp_path / "set.tar"
    with tarfile.open(path, "w") as archive:
        # In no order, and without entries for the folders themselves.
        for file in sorted(source.rglob("*.png"), key=lambda path: path.name):
            archive.add(file, "/".join(filter(None, [arcname, str(file.relative_to(source))])))
    assert prepare(source, tmp_path / "one.h5", "--size", 40) == 0
    before = sorted(tmp_path.iterdir())
    assert prepare(path, tmp_path / "two.h5", "--size", 40) == 0
    assert everything(tmp_path / "one.h5") == everything(tmp_path / "two.h5")
    assert ClassStore(tmp_path / "one.h5").ids("train") == ClassStore(tmp_path / "two.h5").ids("train")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "two.h5"])  # nothing is extracted


def two(tmp_path, pixels, **options):
    """The first of two images, prepared at 40×40 through a folder of two classes."""
    for name in ("cat", "dog"):
        save(tmp_path / "set" / "train" / name / "a.png", pixels, **options)
    save(tmp_path / "set" / "train" / "dog" / "b.png", pixels, **options)
    assert prepare(tmp_path / "set", tmp_path / "set.h5", "--size", 40, "--val", 0.01) == 0
    return ClassStore(tmp_path / "set.h5").image("train", 0)


@pytest.mark.parametrize(("width", "height"), [(120, 80), (80, 120), (60, 20), (400, 33)])
def test_middle_square_is_cropped(tmp_path, width, height):
    """An image green within its middle square, red outside, its upper half a little blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    side = min(width, height)
    y, x = (height - side) // 2, (width - side) // 2
    pixels[..., 0] = 250
    pixels[y : y + side, x : x + side] = (0, 200, 0)
    pixels[: height // 2, :, 2] = 90
    seen = two(tmp_path, pixels)
    assert seen.shape == (40, 40, 3)
    assert seen[..., 0].max() == 0
    np.testing.assert_allclose(seen[..., 1], 200, atol=1)
    np.testing.assert_allclose(seen[[2, 37], 20], [[0, 200, 90], [0, 200, 0]], atol=1)


@pytest.mark.parametrize(("width", "height"), [(40, 40), (40, 41), (51, 40)])
def test_what_has_the_size_keeps_its_values(tmp_path, width, height):
    x, y = (width - 40) // 2, (height - 40) // 2
    np.testing.assert_array_equal(
        two(tmp_path, noise(1, width, height)), noise(1, width, height)[y : y + 40, x : x + 40]
    )


def test_shrunk_images_are_averages(tmp_path):
    expected = noise(1, 160, 160).reshape(40, 4, 40, 4, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(two(tmp_path, noise(1, 160, 160)), expected, atol=0.6)


@pytest.mark.parametrize("side", [8, 28])
def test_small_images_are_read(tmp_path, side):
    pixels = np.full((side, side, 3), (10, 100, 250), np.uint8)
    np.testing.assert_array_equal(two(tmp_path, pixels), np.full((40, 40, 3), (10, 100, 250)))
    assert two(tmp_path, np.full((side, side), 77, np.uint8))[0, 0].tolist() == [77, 77, 77]


def test_images_are_turned_upright(tmp_path):
    """EXIF says: turn by 90° clockwise. What is stored at the left comes to lie at the top."""
    for side in (20, 80):  # read here and by decode_pixels
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[:, : side // 2] = (0, 0, 240)
        exif = Image.Exif()
        exif[0x0112] = 6
        seen = two(tmp_path, pixels, exif=exif)
        assert seen[5, :, 2].min() > 230
        assert seen[35, :, 2].max() < 10


def break_some(train) -> dict[str, str]:
    """What may go wrong with an image, each with a part of what the summary has to say of it."""
    whole = BytesIO()
    Image.fromarray(noise(0)).save(whole, "JPEG")
    (train / "cat" / "half.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (train / "cat" / "empty.jpg").write_bytes(b"")
    (train / "dog" / "text.jpeg").write_text("no image")
    save(train / "dog" / "thin.png", noise(0, 4000, 3))
    save(train / "dog" / "small.png", noise(0, 20, 20))
    (train / "dog" / "small.png").write_bytes((train / "dog" / "small.png").read_bytes()[:200])
    return {
        "train/cat/half.jpg": "damaged or truncated",
        "train/cat/empty.jpg": "the file is empty",
        "train/dog/text.jpeg": "not an image",
        "train/dog/thin.png": "4000×3 is too small",
        "train/dog/small.png": "damaged or truncated",
    }


@pytest.mark.parametrize("as_archive", [False, True])
def test_damaged_images_are_skipped_and_named(halves, tmp_path, capsys, as_archive):
    broken = break_some(halves / "train")
    (halves / "train" / "cat" / "notes.txt").write_text("left alone")
    (halves / "train" / "cat" / "._00.png").write_bytes(b"of a Macintosh")
    save(halves / "train" / "stray.png", noise(0))
    save(halves / "extra" / "cat" / "a.png", noise(0))
    source = archived(halves, tmp_path / "set.tar") if as_archive else halves
    assert prepare(source, tmp_path / "set.h5", "--size", 40) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "set.h5: 26 images of 40×40, 2 classes"
    assert "  2 images outside the class folders skipped" in out
    assert "  5 images skipped:" in out
    for id, reason in broken.items():
        assert any(line.startswith(f"    {id}: ") and reason in line for line in out), (id, out)
        assert sum(id in line for line in out) == 1
    assert len(out) == 4 + 2 + 5
    assert not set(everything(tmp_path / "set.h5")) & set(broken)


def test_strict_stops(halves, tmp_path, capsys):
    (halves / "train" / "dog" / "03.png").write_bytes(b"")
    assert prepare(halves, tmp_path / "set.h5", "--strict") == 2
    assert error(capsys) == "error: train/dog/03.png: the file is empty"
    assert not (tmp_path / "set.h5").exists()


def test_names_that_are_no_text(halves, tmp_path, capsys):
    data = (halves / "train" / "cat" / "00.png").read_bytes()
    (halves / "train" / "cat" / os.fsdecode(b"caf\xe9.png")).write_bytes(data)
    (halves / "train" / "cat" / "a\x1b[2J.png").write_bytes(data)
    for source in (halves, archived(halves, tmp_path / "set.tar")):
        assert prepare(source, tmp_path / "set.h5", "--size", 40) == 0
        out = capsys.readouterr().out
        assert "2 images skipped" in out
        assert "caf\\udce9.png': its name is not plain text" in out
        assert "\x1b" not in out
        assert len(everything(tmp_path / "set.h5")) == 26


def test_image_that_is_no_file_or_absurdly_large(halves, tmp_path, capsys):
    os.mkfifo(halves / "train" / "cat" / "pipe.png")
    with (halves / "train" / "cat" / "large.png").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    (halves / "train" / "cat" / "link.png").symlink_to("nowhere.png")
    assert prepare(halves, tmp_path / "set.h5", "--size", 40) == 0
    out = capsys.readouterr().out
    assert "train/cat/pipe.png: not a file" in out
    assert "train/cat/large.png: 1,099,511,627,776 bytes" in out
    assert "train/cat/link.png: cannot be read" in out


@pytest.mark.parametrize("as_archive", [False, True])
@pytest.mark.parametrize("folder", ["train/bird", "test/cat"])
def test_an_empty_class_folder(halves, tmp_path, capsys, folder, as_archive):
    (halves / folder).mkdir(exist_ok=True)
    for file in (halves / folder).iterdir():
        file.unlink()
    (halves / folder / "notes.txt").write_text("no image")
    source = archived(halves, tmp_path / "set.tar") if as_archive else halves
    assert prepare(source, tmp_path / "set.h5") == 2
    assert error(capsys).endswith(f"the class folder {folder} holds no image")
    assert not list(tmp_path.glob("set.h5*"))


def test_an_empty_class_folder_of_classes_alone(plain, tmp_path, capsys):
    (plain / "ape").mkdir()
    assert prepare(plain, tmp_path / "set.h5") == 2
    assert error(capsys).endswith("the class folder ape holds no image")


@pytest.mark.parametrize(("where", "text"), [(["test"], "test"), (["test", "val"], "val and test")])
def test_a_class_that_is_not_in_train(halves, tmp_path, capsys, where, text):
    for split in where:
        save(halves / split / "bird" / "00.png", noise(0))
    assert prepare(halves, tmp_path / "set.h5") == 2
    assert error(capsys).endswith(f"class 'bird' is in {text} only, so it has no training samples")
    assert not list(tmp_path.glob("set.h5*"))


def test_class_with_only_damaged_images(halves, tmp_path, capsys):
    for file in (halves / "train" / "dog").iterdir():
        file.write_bytes(b"")
    assert prepare(halves, tmp_path / "set.h5") == 2
    assert error(capsys) == "error: class 'dog' has no image to train on"
    assert not list(tmp_path.glob("set.h5*"))


def test_a_class_may_be_called_test(plain, tmp_path):
    (plain / "dog").rename(plain / "test")
    assert prepare(plain, tmp_path / "set.h5", "--size", 40) == 0
    assert ClassStore(tmp_path / "set.h5").classes == ["cat", "test"]


def interrupt(monkeypatch, source, target, *options):
    """A run that Ctrl-C ends after ten images, of which eight have been written."""
    made = []

    def decode(data, name):
        if len(made) == 10:
            raise KeyboardInterrupt
        made.append(name)
        return original(data, name)

    original = class_folders.decode
    with monkeypatch.context() as patch:
        patch.setattr(class_folders, "decode", decode)
        patch.setattr(labelled, "BATCH", 4)
        assert prepare(source, target, "--size", 40, *options) == 130
    assert not target.exists()
    return made


def test_interrupted_run_goes_on(halves, tmp_path, monkeypatch, capsys):
    assert prepare(halves, tmp_path / "whole.h5", "--size", 40) == 0
    made = interrupt(monkeypatch, halves, tmp_path / "set.h5")
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted; the same command resumes it"
    # Nothing of what was written is read again, not even where it has changed.
    for id in made[:8]:
        (halves / id).write_bytes(b"")
    assert prepare(halves, tmp_path / "set.h5", "--size", 40) == 0
    out = capsys.readouterr().out
    assert "  8 images resumed from an interrupted run" in out
    assert "skipped" not in out
    assert everything(tmp_path / "set.h5") == everything(tmp_path / "whole.h5")
    assert ClassStore(tmp_path / "set.h5").ids("train") == ClassStore(tmp_path / "whole.h5").ids("train")


@pytest.mark.parametrize("spoil", ["size", "image more", "archive", "file"])
def test_what_cannot_be_gone_on_with_is_started_anew(halves, tmp_path, monkeypatch, capsys, spoil):
    source = archived(halves, tmp_path / "set.tar") if spoil == "archive" else halves
    target, size = tmp_path / "set.h5", 40
    interrupt(monkeypatch, source, target)
    if spoil == "size":
        size = 20
    elif spoil == "image more":
        save(halves / "train" / "ape" / "a.png", noise(3))  # with which every label is another one
    elif spoil == "archive":
        archived(halves, source)
        os.utime(source, (1, 1))
    else:
        part = tmp_path / "set.h5.part"
        part.write_bytes(part.read_bytes()[:3000])
    assert prepare(source, target, "--size", size) == 0
    assert "resumed" not in capsys.readouterr().out
    store = ClassStore(target)
    assert store.size == (size, size)
    assert store.classes == (["ape", "cat", "dog"] if spoil == "image more" else ["cat", "dog"])


def test_killed_run_goes_on(halves, tmp_path, capsys):
    """SIGKILL, with no time to tidy up: a child kills itself while it reads its tenth image."""
    script = (
        "import os, signal, sys\nfrom data_prep import class_folders, common, labelled\n"
        "original, made = class_folders.decode, []\n"
        "def decode(*arguments):\n"
        "    made.append(1)\n"
        "    return original(*arguments) if len(made) < 10 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "class_folders.decode, labelled.BATCH = decode, 4\n"
        "common.run(class_folders.app, sys.argv[1:])\n"
    )
    target = tmp_path / "set.h5"
    killed = subprocess.run([sys.executable, "-c", script, halves, target, "--size", "40"], check=False)
    assert killed.returncode == -9
    assert not target.exists()
    assert prepare(halves, target, "--size", 40) == 0
    assert "8 images resumed" in capsys.readouterr().out
    assert len(everything(target)) == 26


@pytest.mark.parametrize("cut", ["half", "between members", "header"])
def test_a_damaged_archive(halves, tmp_path, capsys, cut):
    path = archived(halves, tmp_path / "set.tar")
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        member = archive.getmembers()[-4]
    if cut == "half":
        del data[len(data) // 2 + 100 :]
    elif cut == "between members":
        del data[member.offset :]
    else:
        data[member.offset : member.offset + 512] = b"?" * 512
    path.write_bytes(data)
    assert prepare(path, tmp_path / "set.h5") == 2
    assert error(capsys).endswith("set.tar: damaged or cut short")


def test_an_archive_that_points_elsewhere(halves, tmp_path, capsys):
    """Names that lead out of the archive, links and devices are no images of it."""
    save(tmp_path / "secret.png", noise(9))
    path = archived(halves, tmp_path / "set.tar")
    with tarfile.open(path, "a") as archive:
        archive.add(tmp_path / "secret.png", "train/cat/../../../../x.png")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"train/cat/{int(kind)}.png")
            info.type, info.linkname = kind, str(tmp_path / "secret.png")
            archive.addfile(info)
        archive.add(tmp_path / "secret.png", ".")
    assert prepare(path, tmp_path / "set.h5", "--size", 40) == 0
    assert capsys.readouterr().out.splitlines()[0] == "set.h5: 26 images of 40×40, 2 classes"
    assert len(everything(tmp_path / "set.h5")) == 26


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["nowhere", "set.h5"], "no such folder or archive"),
        (["empty", "set.h5"], "no two class folders"),
        (["flat", "set.h5"], "no two class folders"),
        (["one", "set.h5"], "no two class folders"),
        (["text.tar", "set.h5"], "neither a folder nor a tar archive"),
        (["set.tgz", "set.h5"], "decompress it"),
        (["set.tar", "set.tar"], "would replace"),
        (["odd", "set.h5"], "is not plain text"),
        ([], "SRC"),
        (["set", "empty"], "a folder; name a file"),
        (["set", "text.tar/set.h5"], "is a file, not a folder"),
        (["set", "set.h5", "--size", "0"], "--size"),
        (["set", "set.h5", "--val", "0.9"], "--val"),
        (["set", "set.h5", "--what"], "--what"),
    ],
)
def test_bad_input_is_one_line(halves, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save(tmp_path / "flat" / "a.png", noise(0))
    save(tmp_path / "one" / "cat" / "a.png", noise(0))
    for name in ("cat", "d\x1bog"):
        save(tmp_path / "odd" / name / "a.png", noise(0))
    (tmp_path / "text.tar").write_text("no archive")
    archived(halves, tmp_path / "set.tar")
    with tarfile.open(tmp_path / "set.tgz", "w:gz") as archive:
        archive.add(halves, ".")
    assert prepare(*arguments) == 2
    line = error(capsys)
    assert reason in line
    assert "\x1b" not in line
    assert not (tmp_path / "set.h5").exists()
    assert tarfile.is_tarfile(tmp_path / "set.tar")


def test_through_the_true_command(halves, tmp_path):
    command = [sys.executable, "-m", "data_prep.class_folders", halves, tmp_path / "set.h5", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("set.h5: 26 images of 32×32, 2 classes")
    assert "26/26" in done.stderr


def test_help_has_an_example(capsys):
    assert prepare("--help") == 0
    assert "Example: crowdexit prepare class-folders" in capsys.readouterr().out
