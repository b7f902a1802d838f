"""Image files as people have them: whatever their samples, pages and extras, the pixels of the plain 8-bit RGB."""

from __future__ import annotations

import io
import os
import re
import resource
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pillow_heif
import pytest
from hdr import encode_hdr
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile, TiffImagePlugin
from tiffs import BITS, COMPRESSION, ORIENTATION, PHOTOMETRIC, PLANAR, SUBFILE, Page, tiff

from crowdexit.data.images import jpeg, reader
from crowdexit.data.images.limits import ImageError
from crowdexit.data.images.ranges import to_8_bits
from crowdexit.data.images.reader import decode_image, is_image, read_image

Pixels = NDArray[np.uint8]


def scene(width: int = 160, height: int = 96) -> Pixels:
    """Something like a photograph, from black to white, with no two corners alike."""
    y, x = np.mgrid[:height, :width]
    red = 127 + 127 * np.sin(x / 17) * np.cos(y / 23)
    green = 255 * x / (width - 1)
    blue = 255 * y / (height - 1)
    out = np.stack([red, green, blue], -1).astype(np.uint8)
    out[:4, :8], out[-4:, -8:] = 0, 255
    return out


RGB = scene()
GREY = RGB[..., 1].copy()


def encoded(image: Pixels | Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(buffer, format, **options)
    return buffer.getvalue()


def by_opencv(suffix: str, samples: NDArray[Any], *options: int) -> bytes:
    """RGB or grey samples as a file of OpenCV's."""
    if samples.ndim == 3:
        samples = samples[..., [2, 1, 0, 3][: samples.shape[2]]]
    ok, data = cv2.imencode(suffix, np.ascontiguousarray(samples), options)
    assert ok
    return data.tobytes()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    return png[:33] + chunk(name, data) + png[33:]


def assert_like(data: bytes, expected: Pixels, *, off: int = 1, warned: str | None = None) -> None:
    image = decode_image(data)
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    assert image.pixels.dtype == np.uint8
    assert image.pixels.shape == expected.shape
    assert np.abs(image.pixels.astype(int) - expected).max() <= off
    assert ("; ".join(image.warnings) == "") if warned is None else (warned in "; ".join(image.warnings))


def wide(values: NDArray[Any], bits: int) -> NDArray[np.uint16]:
    """8-bit values as so many bits."""
    return np.rint(values * ((2**bits - 1) / 255)).astype(np.uint16)


def pnm(magic: str, maximum: float, samples: NDArray[Any], comment: str = "") -> bytes:
    height, width = samples.shape[:2]
    return f"{magic}\n{comment}{width} {height}\n{maximum}\n".encode() + samples.tobytes()


def text_pnm(magic: str, maximum: int, samples: NDArray[Any]) -> bytes:
    lines = "\n".join(" ".join(map(str, row)) for row in samples.reshape(len(samples), -1))
    return f"{magic} {samples.shape[1]} # wide\n{samples.shape[0]} {maximum}\n{lines}\n".encode()


DEEP: dict[str, Callable[[], tuple[bytes, Pixels]]] = {
    "pgm 16": lambda: (pnm("P5", 65535, wide(GREY, 16).astype(">u2")), GREY),
    "pgm 12": lambda: (pnm("P5", 4095, wide(GREY, 12).astype(">u2"), "# 12 bits\n"), GREY),
    "pgm of 1000": lambda: (pnm("P5", 1000, np.rint(GREY * (1000 / 255)).astype(">u2")), GREY),
    "pgm of 100": lambda: (pnm("P5", 200, np.rint(GREY * (200 / 255)).astype(np.uint8)), GREY),
    "pgm 12, dark": lambda: (pnm("P5", 4095, wide(GREY // 8, 12).astype(">u2")), GREY // 8),
    "ppm 16": lambda: (pnm("P6", 65535, wide(RGB, 16).astype(">u2")), RGB),
    "ppm 12": lambda: (pnm("P6", 4095, wide(RGB, 12).astype(">u2")), RGB),
    "ppm 8": lambda: (pnm("P6", 255, RGB), RGB),
    "plain pgm 12": lambda: (text_pnm("P2", 4095, wide(GREY, 12)), GREY),
    "plain ppm 8": lambda: (text_pnm("P3", 255, RGB), RGB),
    "pfm": lambda: (pnm("PF", -1.0, (RGB / 255).astype("<f4")[::-1]), RGB),
    "pfm, big-endian, grey": lambda: (pnm("Pf", 1.0, (GREY / 255).astype(">f4")[::-1]), GREY),
    "png 16 grey": lambda: (by_opencv(".png", wide(GREY, 16)), GREY),
    "png 16 rgb": lambda: (by_opencv(".png", wide(RGB, 16)), RGB),
    "png 16 rgba": lambda: (
        by_opencv(".png", np.dstack([wide(RGB, 16), np.full_like(GREY, 1, np.uint16) * 65535])),
        RGB,
    ),
    "png 16, shifted": lambda: (by_opencv(".png", RGB.astype(np.uint16) << 8), RGB),
    "png 16, dark but spread": lambda: (by_opencv(".png", (RGB // 8).astype(np.uint16) * 257), RGB // 8),
    "png 12, sBIT": lambda: (with_chunk(by_opencv(".png", wide(RGB, 12)), b"sBIT", b"\x0c\x0c\x0c"), RGB),
    "png 12, sBIT, dark": lambda: (with_chunk(by_opencv(".png", wide(GREY // 8, 12)), b"sBIT", b"\x0c"), GREY // 8),
    "png 12, sBIT, by the standard": lambda: (
        with_chunk(by_opencv(".png", wide(GREY, 12) << 4), b"sBIT", b"\x0c"),
        GREY,
    ),
    "tiff u16 grey": lambda: (tiff([Page(wide(GREY, 16))]), GREY),
    "tiff u16 rgb": lambda: (tiff([Page(wide(RGB, 16))]), RGB),
    "tiff u16 rgb, big-endian": lambda: (tiff([Page(wide(RGB, 16))], order=">"), RGB),
    "tiff u16 rgb, BigTIFF": lambda: (tiff([Page(wide(RGB, 16))], big=True), RGB),
    "tiff u8 rgb, BigTIFF": lambda: (tiff([Page(RGB)], big=True), RGB),
    "tiff u16 rgb, planes": lambda: (tiff([Page(wide(RGB, 16), {PLANAR: [2]})]), RGB),
    "tiff u16 rgb, LZW": lambda: (by_opencv(".tif", wide(RGB, 16), cv2.IMWRITE_TIFF_COMPRESSION, 5), RGB),
    "tiff u16 rgba, deflate": lambda: (
        by_opencv(".tif", np.dstack([wide(RGB, 16), np.full(GREY.shape, 65535, np.uint16)])),
        RGB,
    ),
    "tiff u16, white is zero": lambda: (tiff([Page(65535 - wide(GREY, 16), {PHOTOMETRIC: [0]})]), GREY),
    "tiff u12, packed": lambda: (tiff([Page(GREY, {BITS: [12]}, data=packed12(GREY))]), GREY),
    "tiff u12, packed, dark": lambda: (tiff([Page(GREY, {BITS: [12]}, data=packed12(GREY // 8))]), GREY // 8),
    "tiff u32": lambda: (tiff([Page(GREY.astype(np.uint32) * 0x01010101)]), GREY),
    "tiff i32, full": lambda: (tiff([Page(GREY.astype(np.int32) << 23)]), GREY),
    "tiff f32 of 1": lambda: (tiff([Page((RGB / 255).astype(np.float32))]), RGB),
    "tiff f32 of 255": lambda: (tiff([Page(RGB.astype(np.float32))]), RGB),
    "tiff f32 of 65535": lambda: (tiff([Page(RGB.astype(np.float32) * 257)]), RGB),
    "tiff f32, planes": lambda: (tiff([Page((RGB / 255).astype(np.float32), {PLANAR: [2]})]), RGB),
    "tiff f32, LZW": lambda: (by_opencv(".tif", (RGB / 255).astype(np.float32)), RGB),
    "tiff f16": lambda: (tiff([Page((GREY / 255).astype(np.float16))]), GREY),
    "tiff f64": lambda: (tiff([Page(GREY / 255)]), GREY),
    "tiff i16": lambda: (tiff([Page((GREY.astype(np.int16) << 7) + 127)]), GREY),
    "tiff grey with opacity": lambda: (tiff([Page(np.dstack([wide(GREY, 16), wide(GREY | 255, 16)]))]), GREY),
    "tiff rgb and infrared": lambda: (tiff([Page(np.dstack([wide(RGB, 16), wide(GREY, 16)]), {338: [0]})]), RGB),
}


def packed12(values: Pixels) -> bytes:
    deep = wide(values, 12).reshape(-1, 2)
    first, second = deep[:, 0], deep[:, 1]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits(name: str) -> None:
    data, expected = DEEP[name]()
    assert_like(data, expected)


GUESSED: dict[str, tuple[Callable[[], bytes], Pixels, str]] = {
    "png, 12 bits in 16": (lambda: by_opencv(".png", wide(RGB, 12)), RGB, "read as 12 bits"),
    "png, 10 bits in 16": (lambda: by_opencv(".png", wide(GREY, 10)), GREY, "read as 10 bits"),
    "png, 8 bits in 16": (lambda: by_opencv(".png", GREY.astype(np.uint16)), GREY, "read as 8 bits"),
    "tiff, 12 bits in 16": (lambda: tiff([Page(wide(RGB, 12))]), RGB, "read as 12 bits"),
    "tiff, 8 bits in 32": (lambda: tiff([Page(GREY.astype(np.int32))]), GREY, "read as 8 bits"),
    "tiff, 16 bits in 32": (lambda: tiff([Page(GREY.astype(np.uint32) * 257)]), GREY, "read as 16 bits"),
    "tiff, signed around 0": (lambda: tiff([Page((GREY.astype(int) * 256 - 32768).astype(np.int16))]), GREY, "black"),
    "tiff, signed bytes": (lambda: tiff([Page((GREY.astype(int) - 128).astype(np.int8))]), GREY, "black"),
    "tiff, floats around 0": (
        lambda: tiff([Page((GREY / 127.5 - 1).astype(np.float32))]),
        GREY,
        "−1 is read as black",
    ),
    "tiff, highlights": (
        lambda: tiff([Page((np.where(GREY > 200, 5, GREY / 200)).astype(np.float32))]),
        np.where(GREY > 200, 255, np.rint(GREY * 1.275)).astype(np.uint8),
        "clipped",
    ),
    "tiff, not numbers": (
        lambda: tiff([Page(np.where(GREY < 50, np.nan, GREY / 255).astype(np.float32))]),
        np.where(GREY < 50, 0, GREY).astype(np.uint8),
        "NaN samples",
    ),
}


@pytest.mark.parametrize("name", GUESSED)
def test_guessed_range_is_reported(name: str) -> None:
    make, expected, warning = GUESSED[name]
    assert_like(make(), expected, warned=warning)


@pytest.mark.parametrize(
    ("samples", "words"),
    [
        (GREY.astype(np.float32) * 1000, "floating-point samples up to 255000 are not supported"),
        (GREY.astype(np.float32) - 128, "floating-point samples from -128 to 127 are not supported"),
        (np.full(GREY.shape, np.nan, np.float32), "none of which is a number"),
    ],
)
def test_a_range_that_nobody_knows_is_refused(samples: NDArray[Any], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        decode_image(tiff([Page(samples)]))


def test_truths_and_bits() -> None:
    assert to_8_bits(np.eye(2, dtype=np.bool_))[0].tolist() == [[255, 0], [0, 255]]


@pytest.mark.parametrize(
    ("mode", "format", "off"),
    [
        ("L", "PNG", 0),
        ("LA", "PNG", 0),
        ("RGBA", "PNG", 0),
        ("RGBA", "WEBP", 0),
        ("1", "PNG", 0),
        ("1", "TIFF", 0),
        ("1", "PPM", 0),
        ("P", "PNG", 0),
        ("P", "GIF", 0),
        ("P", "TIFF", 0),
        ("CMYK", "TIFF", 1),
        ("YCbCr", "TIFF", 3),
        ("CMYK", "JPEG", 8),
    ],
)
def test_modes_of_eight_bits(mode: str, format: str, off: int) -> None:
    image = Image.fromarray(RGB).convert(mode)
    options = {"quality": 100} if format == "JPEG" else {"lossless": True} if format == "WEBP" else {}
    assert_like(encoded(image, format, **options), np.asarray(image.convert("RGB")), off=off)


def test_lab() -> None:
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    image = ImageCms.applyTransform(Image.fromarray(RGB), ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert image is not None
    assert np.abs(decode_image(encoded(image, "TIFF")).pixels.astype(int) - RGB).mean() < 2


@pytest.mark.parametrize("deep", [False, True])
def test_transparent_pixels_become_white_with_a_warning(deep: bool) -> None:
    opacity = np.where(np.arange(160) < 80, 0, 255).astype(np.uint8) * np.ones((96, 1), np.uint8)
    expected = np.where(opacity[..., None] == 0, 255, RGB).astype(np.uint8)
    rgba = np.dstack([RGB, opacity])
    data = by_opencv(".png", rgba.astype(np.uint16) * 257) if deep else encoded(rgba, "PNG")
    assert_like(data, expected, warned="counted on white")


def test_a_palette_with_a_transparent_colour() -> None:
    image = Image.fromarray(np.where(GREY > 100, 3, 0).astype(np.uint8), "P")
    image.putpalette([200, 10, 10, *[0] * 6, 20, 30, 40])
    expected = np.where(GREY[..., None] > 100, [20, 30, 40], 255).astype(np.uint8)
    assert_like(encoded(image, "PNG", transparency=0), expected, warned="counted on white")


# HEIC and AVIF


def heif(*images: Pixels, format: str = "HEIF", **options: Any) -> bytes:
    first, *others = (Image.fromarray(image) for image in images)
    return encoded(first, format, quality=95, save_all=bool(others), append_images=others, **options)


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_heic_and_avif(format: str) -> None:
    image = decode_image(heif(RGB, format=format))
    assert image.warnings == ()
    assert np.abs(image.pixels.astype(int) - RGB).mean() < 2


def test_ten_bits_of_heic() -> None:
    samples = wide(RGB, 16)
    file = pillow_heif.from_bytes("RGB;16", (160, 96), samples.tobytes())
    buffer = io.BytesIO()
    file.save(buffer, quality=95)
    assert pillow_heif.open_heif(buffer.getvalue(), convert_hdr_to_8bit=False).info["bit_depth"] == 10
    assert np.abs(decode_image(buffer.getvalue()).pixels.astype(int) - RGB).mean() < 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "HEIF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_once(format: str, orientation: int) -> None:
    """By EXIF, by a field of TIFF, by ``irot`` and ``imir``."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(RGB)
    data = encoded(stored, format, exif=exif.tobytes() if format in ("HEIF", "AVIF") else exif)
    operations = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    expected = np.asarray(stored.transpose(operations[orientation]) if orientation > 1 else stored)
    image = decode_image(data)
    assert image.pixels.shape == expected.shape
    assert np.abs(image.pixels.astype(int) - expected).mean() < 6


@pytest.mark.parametrize("deep", [False, True])
def test_a_tiff_of_any_depth_is_turned_once(deep: bool) -> None:
    data = tiff([Page(wide(RGB, 16) if deep else RGB, {ORIENTATION: [6]})])
    assert_like(data, np.rot90(RGB, -1))


# Fields that nobody needs


def odd_exif() -> bytes:
    """EXIF with an orientation (6) among values of types that no one expects there."""
    fields = [
        (0x0100, 2, 4, b"wide"),  # ImageWidth as text
        (0x0112, 3, 1, struct.pack("<HH", 6, 0)),
        (0x011A, 10, 1, struct.pack("<I", 80)),  # XResolution as −1/0
        (0x011B, 12, 3, struct.pack("<I", 90_000)),  # beyond the end
        (0x8769, 2, 4, b"none"),  # the place of a further table as text
        (0x9000, 13, 2**31, b"\xff\xff\xff\xff"),
    ]
    table = struct.pack("<H", len(fields)) + b"".join(struct.pack("<HHI", *f[:3]) + f[3] for f in fields)
    head = b"II*\0" + struct.pack("<I", 8) + table + bytes(4)
    return b"Exif\0\0" + head.ljust(80, b"\0") + struct.pack("<ii", -1, 0)


def test_odd_values_in_exif_do_not_matter() -> None:
    plain = encoded(RGB, "JPEG", quality=95)
    segment = odd_exif()
    data = plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]
    assert np.array_equal(decode_image(data).pixels, np.rot90(decode_image(plain).pixels, -1))


@pytest.mark.parametrize("error", [struct.error, TypeError, OverflowError, KeyError, RuntimeError, RecursionError])
def test_whatever_fails_at_the_orientation_is_no_fault_of_the_pixels(error: type[Exception], monkeypatch) -> None:
    def failing(*_: object) -> None:
        raise error("odd")

    monkeypatch.setattr(Image.Image, "getexif", failing)
    assert_like(encoded(RGB, "PNG"), RGB, off=0)


def test_odd_fields_of_a_tiff_do_not_matter() -> None:
    """Resolutions and further tables of which libraries expect other types."""
    data = tiff([Page(RGB, {282: [1, 2, 3], 283: [7], 296: [3], 34665: [1], 34853: [2], ORIENTATION: [3]})])
    assert_like(data, RGB[::-1, ::-1], off=0)


@pytest.mark.parametrize(
    "error",
    [struct.error, TypeError, OverflowError, KeyError, AttributeError, RuntimeError, MemoryError, AssertionError],
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_no_error_of_a_library_leaves_the_reader(error: type[Exception], format: str, monkeypatch) -> None:
    def failing(*_: object) -> None:
        raise error("odd\nand long")

    data = encoded(RGB, format)
    for kind in (ImageFile.ImageFile, TiffImagePlugin.TiffImageFile):
        monkeypatch.setattr(kind, "load", failing)
    with pytest.raises(ImageError) as caught:
        decode_image(data, "a.img")
    assert str(caught.value).startswith("a.img: ")
    assert "\n" not in str(caught.value)


# Previews, pages, frames


def test_preview_before_the_image_is_not_counted() -> None:
    small = Page(RGB[::4, ::4].copy(), {SUBFILE: [1]})
    assert_like(tiff([small, Page(RGB)]), RGB, off=0)
    assert_like(tiff([Page(RGB), small]), RGB, off=0)
    assert_like(tiff([Page(small.pixels, {SUBFILE: [1]}, sub=[Page(RGB)])]), RGB, off=0)
    assert_like(tiff([small, Page(wide(RGB, 16), {ORIENTATION: [6]})]), np.rot90(RGB, -1))


def test_the_largest_page_is_counted() -> None:
    """A preview need not say that it is one."""
    assert_like(
        tiff([Page(RGB[::4, ::4].copy()), Page(RGB)]),
        RGB,
        off=0,
        warned="2 pages in the file, only the largest is counted",
    )
    white = np.full_like(RGB, 255)
    pages = tiff([Page(RGB), Page(white), Page(white)])
    assert_like(pages, RGB, off=0, warned="3 pages in the file, only the first is counted")


def test_pages_in_a_circle_end() -> None:
    data = bytearray(tiff([Page(RGB), Page(RGB)]))
    last = len(data) - 4
    struct.pack_into("<I", data, last, struct.unpack_from("<I", data, 4)[0])
    assert "2 pages" in decode_image(bytes(data)).warnings[0]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "AVIF", "HEIF"])
def test_uncounted_frames_are_reported(format: str) -> None:
    frames = [Image.fromarray(np.roll(RGB, 30 * i, axis=1)) for i in range(3)]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    image = decode_image(data)
    assert np.abs(image.pixels.astype(int) - RGB).mean() < 12
    (warning,) = image.warnings
    assert warning.startswith("3 images in the file, only the ")


def test_images_after_the_end_of_a_jpeg_are_reported() -> None:
    one = encoded(RGB, "JPEG")
    preview = encoded(RGB[::2, ::2].copy(), "JPEG")
    assert decode_image(one + one + bytes(7) + one).warnings == ("3 images in the file, only the first is counted",)
    assert decode_image(one + preview).warnings == ()
    assert decode_image(one + b"\xff\xd8\xff\xe0" + bytes(200)).warnings == ()
    mpo = encoded(Image.fromarray(RGB), "MPO", save_all=True, append_images=[Image.fromarray(RGB)])
    assert decode_image(mpo).warnings == ("2 images in the file, only the first is counted",)


# Camera raw


def test_camera_raw_is_refused() -> None:
    preview = {SUBFILE: [1]}
    sensor = Page(wide(GREY, 14), {PHOTOMETRIC: [32803]})
    raw = {
        "DNG": tiff([Page(RGB[::2, ::2].copy(), {**preview, 50706: [1, 4, 0, 0]}, sub=[sensor])]),
        "its sensor alone": tiff([sensor]),
        "NEF": tiff([Page(RGB[::2, ::2].copy(), preview, sub=[Page(GREY, {COMPRESSION: [34713]})])]),
        "ARW": tiff([Page(RGB[::2, ::2].copy()), Page(GREY, {COMPRESSION: [32767]})]),
        "CR2": b"II*\x00\x10\x00\x00\x00CR\x02\x00" + bytes(100),
        "CR3": b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x01crx isom" + bytes(100),
        "RAF": b"FUJIFILMCCD-RAW 0201FF383501" + bytes(100),
        "RW2": b"IIU\x00\x18\x00\x00\x00" + bytes(100),
        "ORF": b"IIRO\x08\x00\x00\x00" + bytes(100),
    }
    for name, data in raw.items():
        with pytest.raises(ImageError, match="photo: camera raw is not supported; export it as JPEG or TIFF"):
            decode_image(data, "photo")
        assert name
    with pytest.raises(ImageError, match=r"photo\.NEF: camera raw is not supported"):
        decode_image(tiff([Page(RGB)]), "photo.NEF")


# Sizes


def test_shapes_that_nobody_has_are_refused_before_they_are_decoded(monkeypatch) -> None:
    def decoded(*_: object) -> None:
        raise AssertionError("it was decoded")

    for name in ("_rgb_of", "imdecode"):
        monkeypatch.setattr(reader, name, decoded)
    long = (
        chunk(b"IHDR", struct.pack(">IIBBBBB", 4_600_000, 32, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", b"")
        + chunk(b"IEND", b"")
    )
    for data, words in [
        (b"\x89PNG\r\n\x1a\n" + long, "4600000×32 is too long"),
        (pnm("P5", 255, np.zeros((32, 2000), np.uint8)), "2000×32 is too long"),
        (b"P6 20000 20000 255\n", "too large"),
        (b"PF 10000 10000 -1\n", r"too large \(75 megapixels at most with 12 bytes a pixel\)"),
        (tiff([Page(GREY, {256: [65_000], 257: [32]})]), "65000×32 is too long"),
        (tiff([Page(wide(GREY, 16), {256: [13_000], 257: [12_000]})]), "too large"),
        (tiff([Page(wide(GREY, 16), {256: [13_000], 257: [12_000]})], big=True), "too large"),
    ]:
        with pytest.raises(ImageError, match=words):
            decode_image(data)


def test_a_check_sees_the_upright_size_before_anything_is_decoded(monkeypatch) -> None:
    monkeypatch.setattr(reader, "_rgb_of", None)

    def check(width: int, height: int) -> None:
        raise ImageError(f"{width}×{height}")

    exif = Image.Exif()
    exif[0x0112] = 6
    for data in (encoded(RGB, "JPEG", exif=exif), tiff([Page(RGB, {ORIENTATION: [6]})])):
        with pytest.raises(ImageError, match=r"^photo: 96×160$"):
            decode_image(data, "photo", check)


# Damage


def flipped(data: bytes, places: NDArray[np.intp]) -> bytes:
    out = bytearray(data)
    for place in places:
        out[place] ^= 0x5A
    return bytes(out)


def test_damage_that_libjpeg_tolerates_is_reported(capfd) -> None:
    rough = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    data = encoded(cv2.resize(rough, (320, 192), interpolation=cv2.INTER_CUBIC), "JPEG", quality=90)
    begin = data.index(b"\xff\xda") + 40
    report = 0
    random = np.random.default_rng(1)
    for _ in range(20):
        try:
            image = decode_image(flipped(data, random.integers(begin, len(data) - 10, 4)))
        except ImageError:
            continue
        report += any("the JPEG data is damaged (" in warning for warning in image.warnings)
    assert report >= 10
    assert decode_image(data).warnings == ()
    assert capfd.readouterr() == ("", "")


def test_jpeg_without_its_last_rows_is_reported(capfd) -> None:
    """Its scan ends early, but properly."""
    data = encoded(RGB, "JPEG", quality=90)
    (warning,) = decode_image(data[:-300] + b"\xff\xd9").warnings
    assert warning == "the JPEG data is damaged (premature end of data segment): the count may be wrong"
    assert capfd.readouterr().err == ""


def test_other_output_survives_the_damage_check(monkeypatch, capfd) -> None:
    def printing(*_: object) -> None:
        os.write(2, b"another thread\nCorrupt JPEG data: bad Huffman code\n")

    monkeypatch.setattr(jpeg, "imdecode", printing)
    assert jpeg.damage(b"") == "bad Huffman code"
    assert capfd.readouterr().err == "another thread\n"


def test_damage_check_without_standard_error(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert jpeg.damage(encoded(RGB, "JPEG")) is None


# What a file is


def test_a_file_is_what_it_holds(tmp_path: Path) -> None:
    for number, data in enumerate([encoded(RGB, "JPEG"), heif(RGB), b"PF 40 40 -1\n", b"IIU\x00\x18\x00\x00\x00"]):
        (tmp_path / f"{number}.bin").write_bytes(data)
        assert is_image(tmp_path / f"{number}.bin")
    (tmp_path / "words").write_text("P5, P6 and other words")
    assert not is_image(tmp_path / "words")
    assert not is_image(tmp_path / "none")


def test_a_png_chunk_that_claims_gigabytes(tmp_path):
    """OpenCV would reserve them. Found by the fuzz's 1987th case."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((64, 96), 40_000, np.uint16)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    assert read_image(_written(tmp_path / "whole.png", data)).pixels.shape == (64, 96, 3)
    at = data.index(b"IDAT") - 4
    data[at : at + 4] = (2**31 - 1).to_bytes(4, "big")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError, match="its length is wrong"):
        read_image(_written(tmp_path / "claims.png", data))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def _written(path: Path, data: bytes | bytearray) -> Path:
    path.write_bytes(data)
    return path


# What other kinds of files hold


def ramp(most: float) -> bytes:
    return tiff([Page((GREY * (most / 255)).astype(np.float32))])


@pytest.mark.parametrize("most", [1023, 4095, 16383])
def test_guessed_float_range_of_camera_bits_is_reported(most: int) -> None:
    assert_like(ramp(most), GREY, warned=f"{most} is read as white")


def test_floats_up_to_a_hundred_are_reported() -> None:
    assert_like(ramp(100), np.rint(GREY * (100 / 255)).astype(np.uint8), warned="up to 100: 255 is read as white")


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_is_tone_mapped_with_a_warning(transfer: str) -> None:
    """As a 16-bit PNG, and as HEIC and AVIF by their colour description."""
    image = (RGB * 0.9).astype(np.uint8)  # without highlights
    code = {"pq": 16, "hlg": 18}[transfer]
    signal = encode_hdr(image, transfer, 203)
    png = with_chunk(by_opencv(".png", signal), b"cICP", bytes([9, code, 0, 1]))
    assert_like(png, image, off=6, warned=f"({transfer.upper()}): tone-mapped")
    for form in ("HEIF", "AVIF"):
        data = heif((signal >> 8).astype(np.uint8), format=form)
        at = data.index(b"colrnclx") + 8
        data = data[:at] + bytes([0, 9, 0, code]) + data[at + 4 :]
        decoded = decode_image(data)
        assert decoded.warnings == (f"high dynamic range ({transfer.upper()}): tone-mapped",)
        assert np.abs(decoded.pixels.astype(int) - image).mean() < 6


@pytest.mark.parametrize("format", ["HEIF", "AVIF"])
def test_a_heif_that_is_cut_short_is_refused(format: str) -> None:
    data = heif(RGB, format=format)
    with pytest.raises(ImageError, match="cut short"):
        decode_image(data[: len(data) - len(data) // 10])


def test_image_after_its_preview_is_reported() -> None:
    preview = encoded(RGB[::2, ::2].copy(), "JPEG")
    assert decode_image(preview + encoded(RGB, "JPEG")).warnings == ("2 images in the file, only the first is counted",)


def test_stream_of_netpbm_images_is_reported() -> None:
    for magic, samples in (("P5", GREY), ("P6", RGB)):
        assert_like(pnm(magic, 255, samples) * 3, samples, warned="only the first is counted")
        assert_like(pnm(magic, 255, samples) + b"\n", samples)


def test_a_fourth_byte_of_a_bitmap_that_nobody_wrote_is_no_opacity() -> None:
    pixels = np.dstack([RGB[..., ::-1], np.zeros(RGB.shape[:2], np.uint8)])[::-1]
    header = struct.pack("<IiiHHIIiiII", 124, 160, 96, 1, 32, 3, pixels.nbytes, 2835, 2835, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(64)
    data = b"BM" + struct.pack("<IHHI", 14 + len(header) + pixels.nbytes, 0, 0, 14 + len(header)) + header
    assert_like(data + np.ascontiguousarray(pixels).tobytes(), RGB)


@pytest.mark.parametrize(("at", "value"), [(4, 12), (1, 0xC3)], ids=["12 bits", "without loss"])
def test_a_jpeg_that_no_decoder_here_knows_is_refused(at: int, value: int) -> None:
    data = bytearray(encoded(RGB, "JPEG"))
    data[data.index(b"\xff\xc0") + at] = value
    with pytest.raises(ImageError, match="not supported; save it as PNG"):
        decode_image(bytes(data))


def test_an_orientation_that_is_a_byte() -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x01\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    assert decode_image(encoded(RGB, "JPEG", exif=exif)).pixels.shape == (160, 96, 3)


def test_kinds_that_are_not_supported_are_named() -> None:
    for name, words in {
        "x.jxl": "JPEG XL is not supported; save it as JPEG or PNG",
        "x.PSD": "Photoshop is not supported",
        "IMG_1.THM": "a camera's preview is not counted",
    }.items():
        with pytest.raises(ImageError, match=words):
            decode_image(encoded(RGB, "JPEG") if "THM" in name else bytes(range(200)), name)


def test_png_with_a_wrong_checksum_is_reported() -> None:
    data = bytearray(encoded(RGB, "PNG", compress_level=0))  # stored: a flipped byte is a wrong pixel
    data[data.index(b"IDAT") + 5000] ^= 4
    image = decode_image(bytes(data))
    assert image.warnings == ("the PNG data is damaged (a checksum does not match): the count may be wrong",)
    assert decode_image(encoded(RGB, "PNG")).warnings == ()


def test_damaged_jpeg_in_a_tiff_is_reported(capfd) -> None:
    rough = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    data = encoded(cv2.resize(rough, (320, 192), interpolation=cv2.INTER_CUBIC), "TIFF", compression="jpeg")
    report, random = 0, np.random.default_rng(1)
    for _ in range(20):
        try:
            image = decode_image(flipped(data, random.integers(len(data) // 4, len(data) * 3 // 4, 8)))
        except ImageError:
            continue
        report += any("the JPEG data is damaged (" in warning for warning in image.warnings)
    assert report >= 10
    assert decode_image(data).warnings == ()
    assert "JPEG" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("tags", "line"),
    [
        ({32997: (4,)}, "x.tif: a TIFF with several planes in depth is not supported; save each as an image"),
        (
            {COMPRESSION: (50001,)},
            "x.tif: a TIFF with WebP compression is not supported; save it with LZW or without compression",
        ),
    ],
)
def test_tiffs_that_are_read_in_part_or_not_at_all_are_refused(tags, line):
    grey = np.full((40, 60), 90, np.uint8)
    with pytest.raises(ImageError, match=f"^{re.escape(line)}$"):
        decode_image(tiff([Page(grey, tags=tags)]), "x.tif")
