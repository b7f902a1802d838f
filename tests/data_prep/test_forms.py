"""The forms in which crowd sets really come: turned by EXIF, endings in capitals, lists and matrices of other tools."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps
from scipy.io import savemat

from crowdexit.data.dataset import CrowdDataset, Setting
from crowdexit.data.image import ImageHeader, decode_pixels
from crowdexit.data.store import Store, StoreError
from crowdexit.data.views import MEAN, STD
from data_prep import common, disco, shanghaitech, speech_commands

WIDTH, HEIGHT = 96, 64


def encoded(pixels: NDArray[np.uint8], orientation: int = 1, format: str = "JPEG") -> bytes:
    exif, buffer = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, format, exif=exif)
    return buffer.getvalue()


def with_heads(seed: int = 0) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Stored pixels with nine light heads on black, and where these are, in the middles of pixels."""
    points = np.random.default_rng(seed).integers((4, 4), (WIDTH - 4, HEIGHT - 4), (9, 2)) + 0.5
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for x, y in points.astype(int):
        pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
    return pixels, points


def part_a(root: Path, image: bytes, heads: object, name: str = "IMG_1.jpg", truth: str = "GT_IMG_1.mat") -> Path:
    half = root / "part_A" / "test_data"
    for folder in ("images", "ground-truth"):
        (half / folder).mkdir(parents=True, exist_ok=True)
    (half / "images" / name).write_bytes(image)
    savemat(half / "ground-truth" / truth, heads if isinstance(heads, dict) else {"annPoints": heads})
    return root


def prepare(source: Path, target: Path, *options: str) -> int:
    return common.run(shanghaitech.app, [str(source), str(target), "--jobs", "1", *options])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["displayed", "stored"])
def test_heads_lie_on_the_image_that_is_trained_on(tmp_path, capsys, orientation, annotated):
    """Whichever way the file is turned: where a head is, the decoded image and the tensor are light."""
    pixels, points = with_heads()
    data = encoded(pixels, orientation)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(BytesIO(data))))
    options = ["--stored-pixels"] if annotated == "stored" else []
    if annotated == "displayed":
        # Where the heads are in the displayed image, told by Pillow: an image of nothing but each head's number.
        numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
        for number, (x, y) in enumerate(points.astype(int), 1):
            numbers[y, x] = number
        png = Image.open(BytesIO(encoded(np.repeat(numbers[..., None], 3, 2), orientation, "PNG")))
        turned = np.asarray(ImageOps.exif_transpose(png))[..., 0]
        rows, columns = np.nonzero(turned)
        points = np.stack([columns, rows], axis=1) + 0.5
    assert prepare(part_a(tmp_path, data, points), tmp_path / "set.h5", *options) == 0
    store = Store(tmp_path / "set.h5")
    sample = store.read("test", "A_IMG_1")
    assert (sample.height, sample.width) == shown.shape[:2]
    assert len(sample.points) == 9
    assert sample.image.tobytes() == data
    decoded = decode_pixels(data)
    assert all(decoded[y, x].min() > 150 for x, y in sample.points.astype(int))
    item = CrowdDataset(store, "test", ["A_IMG_1"], Setting((sample.width, sample.height)))[0]
    light = (item["image"].numpy().transpose(1, 2, 0) * STD + MEAN).mean(axis=2) > 0.6
    assert all(light[y, x] for x, y in sample.points.astype(int))
    assert item["density"].sum() == pytest.approx(9, abs=0.01)
    report = capsys.readouterr()
    assert ("1 images are rotated by EXIF" in report.out) == (orientation != 1)
    assert "warning" not in report.err


def test_wrong_convention_is_reported_with_the_number(tmp_path, capsys):
    pixels, _ = with_heads()
    heads = np.array([[90.5, 10.5], [80.5, 20.5], [10.5, 10.5]])
    assert prepare(part_a(tmp_path, encoded(pixels, 6), heads), tmp_path / "set.h5") == 0
    warning = capsys.readouterr().err.strip().splitlines()[-1]
    assert warning.startswith("warning: 2 of 3 heads lie outside their images (A_IMG_1: 2)")
    assert "try it with --stored-pixels" in warning
    assert prepare(tmp_path, tmp_path / "set.h5", "--stored-pixels") == 0
    assert Store(tmp_path / "set.h5").counts("test") == {"A_IMG_1": 3}
    assert "warning" not in capsys.readouterr().err


def test_a_head_on_the_border_stays_inside():
    for orientation in range(1, 9):
        header = ImageHeader(*((40, 90) if orientation >= 5 else (90, 40)), orientation)
        turned = common.displayed_points(np.array([[0, 0], [89.99, 39.99]], np.float32), header)
        assert (turned >= 0).all()
        assert (turned < (header.width, header.height)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_matrix_is_turned_as_the_image_is(orientation):
    matrix = np.random.default_rng(0).integers(0, 256, (8, 16), np.uint8)
    image = Image.open(BytesIO(encoded(np.repeat(matrix[..., None], 3, 2), orientation, "PNG")))
    expected = np.asarray(ImageOps.exif_transpose(image))[..., 0]
    np.testing.assert_array_equal(common.displayed_matrix(matrix, orientation), expected)


def test_a_density_of_the_stored_pixels_is_not_laid_over_the_displayed_image():
    header, matrix = ImageHeader(360, 640, 6), np.ones((36, 64))
    with pytest.raises(common.CrowdExitError, match=r"m is 64×36, .* at 360×640: EXIF turns it; try it with --stored"):
        disco.laid_as_displayed(matrix, header, "m", stored_pixels=False)
    assert disco.laid_as_displayed(matrix, header, "m", stored_pixels=True).shape == (64, 36)


@pytest.mark.parametrize(
    ("name", "truth", "format"),
    [
        ("IMG_1.JPG", "GT_IMG_1.MAT", "JPEG"),
        ("IMG_1.jpeg", "GT_IMG_1.mat", "JPEG"),
        ("IMG_1.Png", "GT_IMG_1.Mat", "PNG"),
    ],
)
def test_endings_in_capitals_and_of_other_formats(tmp_path, name, truth, format):
    pixels, points = with_heads()
    source = part_a(tmp_path, encoded(pixels, format=format), points, name, truth)
    (source / "part_A/test_data/images/._IMG_1.JPG").write_bytes(b"of macOS")
    assert prepare(source, tmp_path / "set.h5") == 0
    assert Store(tmp_path / "set.h5").counts("test") == {"A_IMG_1": 9}


def test_two_files_for_one_image_are_named(tmp_path, capsys):
    pixels, points = with_heads()
    part_a(tmp_path, encoded(pixels), points, "IMG_1.JPG")
    part_a(tmp_path, encoded(pixels), points, "IMG_2.jpg", "GT_IMG_2.mat")
    part_a(tmp_path, encoded(pixels), points, "IMG_1.png")
    assert prepare(tmp_path, tmp_path / "set.h5") == 0
    assert "A_IMG_1: IMG_1.JPG and IMG_1.png: only one can be meant" in capsys.readouterr().out


HEADS = np.array([[1.5, 2.5], [30, 40]])
CELL = np.empty((1, 1), object)
CELL[0, 0] = {"location": HEADS, "number": 2.0}
FORMS = {
    "published": {"image_info": CELL},
    "struct": {"image_info": {"location": HEADS, "number": 2.0}},
    "another struct": {"truth": {"Location": HEADS, "size": np.zeros((5, 2))}},
    "array": {"annPoints": HEADS},
    "array beside numbers": {"points": HEADS, "count": 2.0, "made_by": "hand"},
    "integers": {"p": np.array([[1, 2], [30, 40]], np.uint16)},
}


@pytest.mark.parametrize("variables", FORMS.values(), ids=FORMS)
def test_heads_in_matrices_of_any_form(tmp_path, variables):
    savemat(tmp_path / "x.mat", variables)
    np.testing.assert_allclose(common.heads_in_mat(tmp_path / "x.mat"), HEADS, atol=0.5)


@pytest.mark.parametrize("variables", [{"annPoints": np.zeros((0, 0))}, {"image_info": {"location": np.zeros((0, 2))}}])
def test_no_heads(tmp_path, variables):
    savemat(tmp_path / "x.mat", variables)
    assert common.heads_in_mat(tmp_path / "x.mat").shape == (0, 2)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"a": HEADS, "b": HEADS}, "found a 2×2, b 2×2"),
        ({"a": np.zeros((3, 4))}, "found a 3×4"),
        ({"text": "none"}, "found no numbers"),
        ({"image_info": {"location": np.zeros((2, 5))}}, "found image_info.location 2×5"),
    ],
)
def test_other_matrices_say_what_was_expected_and_found(tmp_path, variables, found):
    savemat(tmp_path / "x.mat", variables)
    with pytest.raises(common.CrowdExitError) as error:
        common.heads_in_mat(tmp_path / "x.mat")
    assert str(error.value).startswith(
        "x.mat: expected heads as 'image_info' with a field location, or one array N×2; "
    )
    assert str(error.value).endswith(found)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_lists_in_every_usual_encoding(tmp_path, encoding):
    (tmp_path / "GT_1.txt").write_bytes("1.5 2.5\r\n30 40\r\n".encode(encoding))
    np.testing.assert_array_equal(disco.read_heads(tmp_path / "GT_1.txt"), HEADS)
    for name in speech_commands.LISTS.values():
        (tmp_path / name).write_bytes("yes/é.wav\r\n".encode(encoding))
    skipped: common.Skipped = []
    splits = speech_commands.read_lists(tmp_path, {"yes/é.WAV", "no/b.wav"}, skipped, [], strict=True)
    assert splits == {"no/b.wav": "train"}
    assert skipped == [("yes/é.WAV", "both lists name it")]


def by_hand(path: Path, **changes: object) -> Path:
    """A store of the documented parts alone, made with h5py."""
    pixels, points = with_heads()
    parts = {"image": np.frombuffer(encoded(pixels, 6), np.uint8), "points": points, "count": 9, "audio_source": "none"}
    parts |= changes
    with h5py.File(path, "w") as file:
        group = file.create_group("val/a")
        for name, value in parts.items():
            if value is None:
                continue
            if isinstance(value, np.ndarray):
                group[name] = value
            else:
                group.attrs[name] = value
    return path


@pytest.mark.parametrize("source", ["none", np.bytes_(b"none")])
def test_a_store_of_the_documented_parts_alone_is_read(tmp_path, source):
    sample = Store(by_hand(tmp_path / "set.h5", audio_source=source)).read("val", "a")
    assert (sample.width, sample.height) == (HEIGHT, WIDTH)
    assert (sample.count, sample.points.dtype, sample.points.shape) == (9, np.float32, (9, 2))


@pytest.mark.parametrize("part", ["image", "points", "count", "audio_source"])
def test_a_missing_part_is_named(tmp_path, part):
    with pytest.raises(StoreError, match=rf"set\.h5: val/a lacks '{part}' \(it has "):
        Store(by_hand(tmp_path / "set.h5", **{part: None})).read("val", "a")


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        ("points", np.zeros((4, 3)), "'points' has the shape \\(4, 3\\), not N×2"),
        ("image", np.zeros((8, 8, 3), np.uint8), "an encoded image's bytes"),
        ("image", np.zeros(80, np.uint8), "not an image"),
        ("audio_source", "radio", "'radio', not one of recorded, simulated, none"),
        ("count", float("nan"), "has the count nan"),
    ],
)
def test_a_part_of_another_form_is_named(tmp_path, part, value, says):
    with pytest.raises(StoreError, match=says):
        Store(by_hand(tmp_path / "set.h5", **{part: value})).read("val", "a")


def test_sizes_that_are_not_the_images_are_not_trained_on(tmp_path):
    store = Store(by_hand(tmp_path / "set.h5", width=WIDTH, height=HEIGHT))
    with pytest.raises(StoreError, match="displayed at 64×96, but its width and height say 96×64"):
        CrowdDataset(store, "val", ["a"], Setting((96, 96)))[0]
