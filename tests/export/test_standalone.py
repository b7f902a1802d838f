"""An exported folder runs by itself: with NumPy, OpenCV and its engine, without PyTorch and this package."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zlib import crc32

import networks
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from crowdexit.cli.main import app
from crowdexit.data.image import ImageError, read_pixels
from crowdexit.data.images.reader import read_image as read_any
from crowdexit.export.bundle import sources
from crowdexit.export.images import read_image
from crowdexit.export.writer import export
from crowdexit.models import zoo

RANDOM = np.random.default_rng(0)


def environment(folder: Path, *packages: str) -> Path:
    """A Python that has these packages of this environment, and nothing else."""
    venv.create(folder, symlinks=True, with_pip=False)
    mine = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    libraries = Path(sysconfig.get_path("purelib"))
    for path in (*(libraries / name for name in packages), *libraries.glob("*.libs")):
        (mine / path.name).symlink_to(path)
    python = folder / "bin" / "python"
    for name in ("torch", "crowdexit", "PIL", "pydantic"):
        assert run(python, "-c", f"import {name}").returncode == 1
    return python


def run(python: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What a Python says outside of the checkout, isolated from PYTHONPATH."""
    command = [str(python), "-I", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=python.parent)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    return environment(tmp_path_factory.mktemp("bare"), "numpy", "cv2", "openvino", "onnxruntime")


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images") / "street.jpg"
    Image.fromarray(RANDOM.integers(0, 255, (90, 140, 3), np.uint8)).resize((280, 180)).save(path)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    zoo.save(networks.made("audiocsrnet"), networks.SPECS["audiocsrnet"], folder / "m" / "model.safetensors")
    return export(folder / "m", folder / "street", exits=["AV1"])


@pytest.fixture(scope="module")
def onnx(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    spec = zoo.Spec("transcrowd-token-s", (), {**networks.VIT, "depth": 1, "audio_width": 0.0})
    torch.manual_seed(0)
    zoo.save(networks.settled(zoo.build(spec)), spec, folder / "m" / "model.safetensors")
    return export(folder / "m", folder / "street", library="onnx")


def by_the_command(model: Path, *arguments: object) -> dict[str, float]:
    done = CliRunner().invoke(app, ["count", *map(str, arguments), "--model", str(model), "--format", "json"])
    assert done.exit_code == 0, done.output
    return {one["exit"]: one["count"] for one in json.loads(done.stdout)["exits"]}


def by_itself(python: Path, folder: Path, *arguments: object) -> dict[str, float]:
    done = run(python, folder / "count.py", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return {name: float(count) for name, count in (line.split("\t") for line in done.stdout.splitlines())}


@pytest.mark.parametrize("folder", ["exported", "onnx"])
def test_the_same_counts_as_the_command(folder, python, image, request):
    folder = request.getfixturevalue(folder)
    expected = by_the_command(folder, image)
    assert by_itself(python, folder, image) == pytest.approx(expected, rel=1e-4, abs=0.006)


def test_audio_changes_them_as_it_does_there(exported, python, image, tmp_path):
    mel = RANDOM.normal(size=(96, 64)).astype(np.float32)
    np.save(tmp_path / "audio.npy", mel)
    with_audio = by_itself(python, exported, image, "--log-mel", tmp_path / "audio.npy")
    assert with_audio["final"] != pytest.approx(by_itself(python, exported, image)["final"], abs=0.1)
    from crowdexit.export.runner import Exported

    expected = {result.exit: result.count for result in Exported(exported).stream(image, mel)}
    assert with_audio == pytest.approx(expected, rel=1e-4, abs=0.006)


def test_the_counts_do_not_depend_on_the_working_directory_or_its_name(exported, python, image, tmp_path):
    moved = tmp_path / "another name"
    moved.symlink_to(exported)
    assert by_itself(python, moved, image) == by_itself(python, exported, image)


def test_a_large_image_is_counted_in_tiles(exported, python, tmp_path):
    Image.fromarray(RANDOM.integers(0, 255, (300, 1100, 3), np.uint8)).save(tmp_path / "large.png")
    np.save(tmp_path / "audio.npy", np.zeros((96, 64)))
    done = run(python, exported / "count.py", tmp_path / "large.png", "--log-mel", tmp_path / "audio.npy")
    assert done.stderr == f"warning: {tmp_path / 'large.png'}: counted in tiles, without the audio\n"
    expected = by_the_command(exported, tmp_path / "large.png")
    assert float(done.stdout.split()[-1]) == pytest.approx(expected["final"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "the following arguments are required: image"),
        (["street.jpg", "--exit", "V1"], "unrecognized arguments: --exit V1"),
        (["nowhere.jpg"], "nowhere.jpg: cannot be read (No such file or directory)"),
        (["street.tiff"], "only JPEG and PNG with 8 bits are read here; save it as one"),
        (["words.jpg"], "only JPEG and PNG with 8 bits are read here"),
        (["cut.jpg"], "a damaged or truncated image"),
        (["small.png"], "20×20 is too small to count in"),
        (["street.jpg", "--log-mel", "words.jpg"], "words.jpg: no array in a .npy file"),
        (["street.jpg", "--log-mel", "nowhere.npy"], "nowhere.npy: cannot be read (No such file or directory)"),
        (["street.jpg", "--log-mel", "short.npy"], "short.npy: a log-mel is an array (96, 64) of numbers"),
    ],
)
def test_what_is_refused_is_one_line(arguments, line, exported, python, image, tmp_path):
    data = image.read_bytes()
    (tmp_path / "street.jpg").write_bytes(data)
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "words.jpg").write_text("words")
    Image.new("RGB", (64, 64)).save(tmp_path / "street.tiff")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    np.save(tmp_path / "short.npy", np.zeros((64, 64)))
    done = run(python, exported / "count.py", *(tmp_path / a if "." in a else a for a in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["manifest.json", "stage-0.bin"])
def test_damage_is_one_line(name, exported, python, image, tmp_path):
    folder = tmp_path / "street"
    subprocess.run(["cp", "-r", str(exported), str(folder)], check=True)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    done = run(python, folder / "count.py", image)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {folder / name}: damaged (")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("packages", "line"),
    [
        (["numpy", "cv2"], "error: openvino is not installed: pip install openvino\n"),
        (["numpy"], "error: cv2 is not installed; this needs NumPy, OpenCV and OpenVINO\n"),
    ],
)
def test_what_is_not_installed_is_named(packages, line, exported, image, tmp_path):
    done = run(environment(tmp_path / "bare", *packages), exported / "count.py", image)
    assert (done.returncode, done.stderr) == (2, line)


def test_its_modules_are_this_package_s_own():
    """Nothing of this package is imported by its own name, and everything else is of Python, NumPy or OpenCV."""
    imported = set()
    for source in sources().values():
        imported |= {
            line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))
        }
    assert imported - {""} <= {*sys.stdlib_module_names, "numpy", "cv2"}


def saved(path: Path, mode: str, turned: int = 1, **options: object) -> Path:
    pixels = np.random.default_rng(1).integers(0, 255, (48, 80, 4), np.uint8)
    picture = Image.fromarray(pixels)
    picture = picture.convert("LA").convert(mode) if mode == "LA" else picture.convert(mode)
    exif = Image.Exif()
    if turned != 1:
        exif[274] = turned
    picture.save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_images_turned_by_a_camera_are_read_as_elsewhere(name, turned, tmp_path):
    path = saved(tmp_path / name, "RGB", turned)
    pixels, warnings = read_image(path)
    np.testing.assert_array_equal(pixels, read_pixels(path))
    assert warnings == []


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "L", {}),
        ("a.jpg", "RGB", {"progressive": True, "subsampling": 2}),
        ("a.png", "1", {}),
        ("a.png", "L", {}),
        ("a.png", "P", {}),
        ("a.png", "P", {"transparency": 7}),
        ("a.png", "LA", {}),
        ("a.png", "RGBA", {}),
    ],
)
def test_images_of_other_modes_are_read_as_elsewhere(name, mode, options, tmp_path):
    path = saved(tmp_path / name, mode, **options)
    pixels, warnings = read_image(path)
    expected = read_any(path)
    np.testing.assert_array_equal(pixels, expected.pixels)
    assert tuple(warnings) == expected.warnings


def with_chunk(data: bytes, kind: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    chunk = len(content).to_bytes(4, "big") + kind + content + crc32(kind + content).to_bytes(4, "big")
    return data[:33] + chunk + data[33:]


def test_images_that_are_refused(tmp_path):
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(tmp_path / "deep.png")
    Image.new("CMYK", (64, 64)).save(tmp_path / "cmyk.jpg")
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    (tmp_path / "hdr.png").write_bytes(with_chunk(plain, b"cICP", bytes([9, 16, 0, 1])))
    saved(tmp_path / "turned.png", "RGBA", 6)
    (tmp_path / "cut.png").write_bytes(plain[:-20])
    (tmp_path / "header.png").write_bytes(plain[:30])
    for name, line in {
        "deep.png": "8 bits are read here",
        "cmyk.jpg": "8 bits are read here",
        "hdr.png": "8 bits are read here",
        "turned.png": "save it as JPEG",
        "cut.png": "damaged or truncated",
        "header.png": "damaged or truncated",
    }.items():
        with pytest.raises(ImageError, match=line):
            read_image(tmp_path / name)


def test_damage_that_can_be_read_is_reported_as_elsewhere(image, tmp_path):
    data = bytearray(image.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4] = b"\x12\x34\x56\x78"
    path = tmp_path / "damaged.jpg"
    path.write_bytes(data)
    pixels, warnings = read_image(path)
    expected = read_any(path)
    assert "the JPEG data is damaged" in warnings[0]
    assert tuple(warnings) == expected.warnings
    np.testing.assert_array_equal(pixels, expected.pixels)
