"""From the bytes of an image file to upright 8-bit RGB."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import cv2
import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageFile, JpegImagePlugin, UnidentifiedImageError

from crowdexit.data.hdr import Primaries, Transfer, to_sdr
from crowdexit.data.images import isobmff, jpeg, netpbm, png, tiff
from crowdexit.data.images.limits import MAX_PIXELS, ImageError, check_size
from crowdexit.data.images.opencv import imdecode
from crowdexit.data.images.ranges import RangeUnknown, to_8_bits
from crowdexit.utils.memory import return_freed_memory
from crowdexit.utils.paths import is_file

SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".webp", ".tif", ".tiff", ".gif"),
    *(".heic", ".heif", ".hif", ".avif", ".pbm", ".pgm", ".ppm", ".pnm", ".pfm"),
)
# Of all that Pillow reads; some of the rest it hands to other programs (PostScript).
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM", "AVIF", "HEIF")
RAW_SUFFIXES = (
    *(".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".sr2", ".srf", ".raf", ".rw2", ".rwl", ".orf", ".pef"),
    *(".srw", ".3fr", ".fff", ".iiq", ".erf", ".mef", ".mos", ".kdc", ".dcr", ".x3f", ".mrw", ".gpr"),
)
_RAW_MAGIC = (b"FUJIFILMCCD-RAW", b"IIU\x00", b"IIRO", b"IIRS", b"MMOR", b"\x00MRM", b"FOVb", b"II\x1a\x00\x00\x00HEAP")
_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
# What others read, and nothing here does: refused by name.
OTHER_SUFFIXES = {
    **dict.fromkeys((".jxl",), "JPEG XL"),
    **dict.fromkeys((".jp2", ".j2k", ".jpx", ".jpf", ".j2c"), "JPEG 2000"),
    **dict.fromkeys((".jxr", ".wdp", ".hdp"), "JPEG XR"),
    **dict.fromkeys((".psd", ".psb"), "Photoshop"),
    **dict.fromkeys((".exr",), "OpenEXR"),
    **dict.fromkeys((".hdr", ".rgbe"), "Radiance HDR"),
    **dict.fromkeys((".tga", ".icb", ".vda"), "Targa"),
    **dict.fromkeys((".svg", ".svgz", ".eps", ".pdf", ".ai"), "a page description"),
    **dict.fromkeys((".ico", ".cur", ".icns"), "an icon"),
    **dict.fromkeys((".qoi", ".dds", ".ktx", ".ktx2", ".xcf", ".fits", ".fit", ".dcm"), "this format"),
}
PREVIEW_SUFFIX = ".thm"  # which cameras write beside a raw image or a video
_PNG_BYTES = {0: 2, 2: 6}  # of a pixel with 16 bits, by colour type; with opacity eight
_LARGE = 2**27  # bytes of pixels; a camera's image has fewer
_ROWS = 256  # of an image that are converted at once

pillow_heif.register_heif_opener()  # it reads no thumbnails, depth maps and auxiliary images by itself


@dataclass(frozen=True)
class DecodedImage:
    """An image file's pixels, and what its reader has to say about them.

    Attributes:
        pixels: H×W×3 uint8, RGB, upright.
        warnings: one line each, e.g. "3 images in the file, only the first is counted"; empty when all is well.
            Whoever counts the pixels passes them on to the user.
    """

    pixels: NDArray[np.uint8]
    warnings: tuple[str, ...] = ()


class _Notes(list[str]):
    """Warnings, in the order in which they came up; each is one line."""

    def add(self, text: str | None) -> None:
        if text:
            self.append(" ".join(text.split()))


SizeCheck = Callable[[int, int], object]


def decode_image(data: bytes, name: str = "image", check: SizeCheck | None = None) -> DecodedImage:
    """Encoded bytes → pixels H×W×3 uint8, RGB, upright, and warnings.

    What it is is told by its contents, not by its name; what is read, and how, stands in docs/inputs.md. The size is
    checked before anything is decoded, so that a small file cannot fill the memory.

    Args:
        check: is called with (width, height), upright, before anything is decoded; what it raises is raised.

    Raises:
        ImageError: empty, not an image, damaged, of a kind that is not supported (camera raw), or refused by
            :func:`crowdexit.data.images.limits.check_size`. Whatever a library raises becomes this.
    """
    if not data:
        raise ImageError(f"{name}: the file is empty")
    notes = _Notes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are checked here, and of faults that do not matter
            pixels = _decode(data, name, notes, partial(_checked, name, check))
        if pixels.nbytes > _LARGE:
            return_freed_memory()  # the decoder's own copy
        return DecodedImage(pixels, tuple(notes))
    except ImageError:
        raise
    except UnidentifiedImageError:
        other = OTHER_SUFFIXES.get(PurePath(name).suffix.lower())
        if other is not None:
            raise ImageError(f"{name}: {other} is not supported; save it as JPEG or PNG") from None
        raise ImageError(f"{name}: not an image") from None
    except Image.DecompressionBombError:
        raise ImageError(f"{name}: too large ({MAX_PIXELS // 10**6} megapixels at most)") from None
    except MemoryError:
        raise ImageError(f"{name}: not enough memory to read it") from None
    except RangeUnknown as error:
        raise ImageError(f"{name}: {error} are not supported; save it with 8 or 16 bits") from None
    except tiff.UnsupportedTiff as error:
        raise ImageError(f"{name}: a TIFF with {error} is not supported; {error.remedy}") from None
    except Exception as error:  # a library of images may raise whatever a damaged file makes of its state
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{name}: a damaged or truncated image ({reason})") from None


def read_image(path: str | Path, check: SizeCheck | None = None) -> DecodedImage:
    """Read an image file; see :func:`decode_image`.

    Raises:
        ImageError: no such file, or as :func:`decode_image`.
    """
    path = Path(path)
    if not is_file(path):
        raise ImageError(f"{path}: no such file")
    try:
        return decode_image(path.read_bytes(), str(path), check)
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None


def from_pil(image: Image.Image, name: str = "image") -> DecodedImage:
    """An image that was opened with Pillow, of any mode: the pixels and warnings that its file would give.

    Raises:
        ImageError: damaged, of a mode that is not supported, or too large.
    """
    notes = _Notes()
    try:
        check_size(name, *image.size, 8)
        orientation = orientation_of(image)
        image.load()
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            pixels = _to_rgb(np.asarray(image)[..., None], None, None, notes)
        else:
            pixels = _rgb_of(image, notes)
        return DecodedImage(_upright(pixels, orientation), tuple(notes))
    except ImageError:
        raise
    except RangeUnknown as error:
        raise ImageError(f"{name}: {error} are not supported; convert it to RGB") from None
    except Exception as error:  # a library of images may raise whatever a damaged file makes of its state
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ImageError(f"{name}: a damaged or truncated image ({reason})") from None


def is_image(path: Path) -> bool:
    """Whether a file is an image by its contents, or camera raw, which the reader refuses."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
        if _is_raw(head, "") or netpbm.read_header(head) is not None:
            return True
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS):
            return True
    except Exception:  # whatever a reader makes of a file that is not its own
        return False


def _checked(name: str, check: SizeCheck | None, width: int, height: int) -> None:
    """Call a check that knows no name."""
    try:
        if check is not None:
            check(width, height)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from None


def _is_raw(head: bytes, name: str) -> bool:
    """Whether a file is camera raw by its first bytes or by its name."""
    return head.startswith(_RAW_MAGIC) or head[4:11] == b"ftypcrx" or PurePath(name).suffix.lower() in RAW_SUFFIXES


def _decode(data: bytes, name: str, notes: _Notes, check: SizeCheck) -> NDArray[np.uint8]:
    raw = ImageError(f"{name}: camera raw is not supported; export it as JPEG or TIFF")
    if _is_raw(data[:64], name):
        raise raw
    suffix = PurePath(name).suffix.lower()
    if suffix == PREVIEW_SUFFIX:
        raise ImageError(f"{name}: a camera's preview is not counted; count the image or video itself")
    header = netpbm.read_header(data)
    if header is not None:
        check_size(name, header.width, header.height, header.bytes_per_pixel)
        check(header.width, header.height)
        samples = header.samples(data)
        if header.is_followed(data):
            notes.add("several images in the file, only the first is counted")
        return _to_rgb(samples.reshape(*samples.shape[:2], -1), None, header.maximum, notes)
    if data.startswith(_TIFF_MAGIC):
        pages = tiff.pages_of(data)
        if tiff.is_raw(data, pages):
            raise raw
        page, others = tiff.image_page(pages)
        check_size(name, *page.size, page.bytes_per_pixel)
        check(*upright_size(page.size, page.orientation))
        notes.add(_left_out(others + 1, "first" if page is pages[0] else "largest", "pages"))
        page.check_supported()
        try:
            pixels = _tiff_page(page, notes)
        except Exception as error:
            if page.optional_compression is None or isinstance(error, RangeUnknown):
                raise
            kind = f"{page.optional_compression} compression"
            raise tiff.UnsupportedTiff(kind, "save it with LZW or without compression") from error
        return _upright(pixels, page.orientation)
    is_jpeg = data.startswith(b"\xff\xd8\xff")
    if is_jpeg and not jpeg.has_8_bits(data):
        raise ImageError(f"{name}: a JPEG with more than 8 bits or without loss is not supported; save it as PNG")
    # Of a JPEG with several images Pillow would make an MPO, by a table that need not be right.
    with _opened(data) if not is_jpeg else JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
        deep, hdr = _is_deep_png(data), _hdr_of(data)
        check_size(name, *image.size, (_PNG_BYTES.get(data[25], 8) if deep else 4) + (6 if hdr else 0))
        orientation = orientation_of(image)
        check(*upright_size(image.size, orientation))
        if is_jpeg:
            _note_jpeg(data, notes)
        else:
            _note_others(image, data, notes)
        if image.format in ("HEIF", "AVIF") and isobmff.is_cut_short(data):
            raise ValueError("the file is cut short")
        if data.startswith(png.MAGIC) and png.is_damaged(data):
            notes.add("the PNG data is damaged (a checksum does not match): the count may be wrong")
        if hdr is not None:
            notes.add(f"high dynamic range ({hdr[0].upper()}): tone-mapped")
        if deep:
            return _upright(_deep_png(data, hdr, notes), orientation)
        image.load()
        pixels = _rgb_of(image, notes)
        return _upright(pixels if hdr is None else to_sdr(pixels.astype(np.uint16) * 257, *hdr), orientation)


def _hdr_of(data: bytes) -> tuple[Transfer, Primaries] | None:
    """How a PNG, HEIF or AVIF of high dynamic range encodes light and colours; None of another image."""
    if data.startswith(png.MAGIC):
        code = tuple(png.content(data, b"cICP") or ())[:2]
    else:
        code = isobmff.nclx(data) if isobmff.is_image(data[:16]) else ()
    if len(code) < 2 or code[1] not in isobmff.TRANSFERS:
        return None
    return isobmff.TRANSFERS[code[1]], isobmff.PRIMARIES.get(code[0], "bt2020")


def _opened(data: bytes) -> ImageFile.ImageFile:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _note_damage(data: bytes, notes: _Notes) -> None:
    damage = jpeg.damage(data)
    notes.add(damage and f"the JPEG data is damaged ({damage}): the count may be wrong")


def _note_jpeg(data: bytes, notes: _Notes) -> None:
    """Say what libjpeg has to say, and how many images of the same size follow the first.

    Smaller ones are previews, or maps of depth and brightness that belong to the first. A larger one is what the
    first is a preview of.
    """
    _note_damage(data, notes)
    first, *others = jpeg.sizes(data)
    notes.add(_left_out(1 + sum(w * h >= first[0] * first[1] for w, h in others), "first"))


def _note_others(image: ImageFile.ImageFile, data: bytes, notes: _Notes) -> None:
    """Say how many other images a file has, which are not counted."""
    try:
        number = getattr(image, "n_frames", 1)
    except Exception:  # what comes after the first image is damaged
        notes.add("the images behind the first one are damaged, only the first is counted")
        return
    notes.add(_left_out(number, "primary one" if image.format == "HEIF" else "first"))
    if image.format == "HEIF" and data[8:12] in (b"msf1", b"hevc", b"hevx"):
        notes.add("an image sequence: only its primary image is counted")


def _left_out(number: int, counted: str, what: str = "images") -> str | None:
    return f"{number} {what} in the file, only the {counted} is counted" if number > 1 else None


def orientation_of(image: Image.Image) -> int:
    """The orientation of EXIF (1 to 8); 1 where it cannot be read, whatever else is wrong there."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of all that a camera may have written, only this is needed
        return 1
    if isinstance(turned, bytes) and len(turned) == 1:  # written as a byte
        turned = turned[0]
    return turned if isinstance(turned, int) and 1 <= turned <= 8 else 1


def upright_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    return (size[1], size[0]) if 5 <= orientation <= 8 else size


def _upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn and mirror pixels as an EXIF orientation asks for; they may be the same array."""
    if orientation in (2, 5, 7):
        pixels = pixels[:, ::-1]
    if orientation == 4:
        pixels = pixels[::-1]
    turns = {3: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)  # anticlockwise
    return np.ascontiguousarray(np.rot90(pixels, turns))


def _rgb_of(image: Image.Image, notes: _Notes) -> NDArray[np.uint8]:
    """A loaded image of at most eight bits as RGB, some rows at a time: Pillow's copies take four bytes a pixel."""
    width, height = image.size
    convert = _conversion(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    if image.format == "BMP" and transparent and image.getextrema()[-1] == (0, 0):
        transparent = False  # the fourth byte is there, and nobody has written to it
    out = np.empty((height, width, 3), np.uint8)
    hidden = False
    for top in range(0, height, _ROWS):
        rows = image.crop((0, top, width, min(height, top + _ROWS)))
        if transparent:
            rgba = np.asarray(rows.convert("RGBA"))
            hidden = _lay_on_white(rgba, out[top : top + _ROWS]) or hidden
        else:
            out[top : top + _ROWS] = np.asarray(convert(rows))
    _note_transparency(hidden, notes)
    return out


def _conversion(image: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What makes RGB of an image of this mode; of CMYK by its colour profile, where it has one that can be used."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB" or (image.mode == "CMYK" and profile):
        try:
            source = (
                ImageCms.createProfile("LAB")
                if image.mode == "LAB"
                else ImageCms.ImageCmsProfile(io.BytesIO(profile or b""))
            )
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, "RGB")
            return lambda rows: ImageCms.applyTransform(rows, transform) or rows
        except ImageCms.PyCMSError:
            pass
    return lambda rows: rows.convert("RGB")


def _lay_on_white(rgba: NDArray[np.uint8], out: NDArray[np.uint8]) -> bool:
    """Lay pixels (h, w, 4) on white, as a viewer shows them, into ``out`` (h, w, 3); whether any is transparent."""
    alpha = rgba[..., 3:].astype(np.uint16)
    if alpha.min() == 255:
        out[:] = rgba[..., :3]
        return False
    out[:] = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return True


def _note_transparency(hidden: bool, notes: _Notes) -> None:
    notes.add("partly transparent: it is counted on white" if hidden else None)


def _tiff_page(page: tiff.Page, notes: _Notes) -> NDArray[np.uint8]:
    """A page as it is stored."""
    if page.deep:
        colours, opacity = page.samples()
        pixels = _to_rgb(colours, opacity, page.maximum, notes)
        return 255 - pixels if page.white_is_zero else pixels
    if page.is_jpeg:
        _note_damage(page.alone(), notes)
    if page.ycbcr:
        rgb = imdecode(page.alone(), cv2.IMREAD_COLOR_RGB)
        if rgb is None:
            raise tiff.UnsupportedTiff("samples of this kind")
        return rgb
    try:
        with _opened(page.alone()) as image:
            image.load()
            return _rgb_of(image, notes)
    except UnidentifiedImageError:
        raise tiff.UnsupportedTiff("samples of this kind") from None


def _is_deep_png(data: bytes) -> bool:
    return data.startswith(png.MAGIC) and data[24:25] == b"\x10"


def _deep_png(data: bytes, hdr: tuple[Transfer, Primaries] | None, notes: _Notes) -> NDArray[np.uint8]:
    """A PNG with 16 bits. By the standard its samples fill them, whatever ``sBIT`` says; where they do not, that
    chunk tells how many bits they have."""
    png.check_lengths(data)
    samples = imdecode(data)
    if samples is None or samples.dtype != np.uint16:
        raise ValueError("its data cannot be decoded")
    if samples.ndim == 2:
        samples = samples[..., None]
    if hdr is not None and samples.shape[2] >= 3:
        return to_sdr(samples[..., 2::-1], *hdr)
    bits = max((png.content(data, b"sBIT") or b"")[:3], default=16)
    opacity = samples[..., 3:] if samples.shape[2] == 4 else None
    return _to_rgb(samples[..., 2::-1], opacity, (1 << bits) - 1 if 8 <= bits < 16 else None, notes)


def _to_rgb(
    colours: NDArray[Any], opacity: NDArray[Any] | None, maximum: int | None, notes: _Notes
) -> NDArray[np.uint8]:
    """Samples of any kind as RGB.

    Args:
        colours: (h, w, 1 or 3). opacity: (h, w, 1) or None.
        maximum: as of :func:`to_8_bits`.
    """
    pixels, note = to_8_bits(colours, maximum)
    notes.add(note)
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    if opacity is not None:
        alpha, _ = to_8_bits(opacity, maximum)
        rows = [slice(top, top + _ROWS) for top in range(0, len(pixels), _ROWS)]
        hidden = [_lay_on_white(np.concatenate([pixels[of], alpha[of]], axis=2), pixels[of]) for of in rows]
        _note_transparency(any(hidden), notes)
    return pixels
