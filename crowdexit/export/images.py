"""Images for exported networks: JPEG and PNG with 8 bits, read with OpenCV alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.images.jpeg import channels, damage, has_8_bits, sizes
from crowdexit.data.images.limits import ImageError, check_size
from crowdexit.data.images.opencv import imdecode
from crowdexit.data.images.png import MAGIC, chunks, content, is_damaged

_OTHERS = "only JPEG and PNG with 8 bits are read here; save it as one"
_HDR = (b"\x10", b"\x12")  # transfer characteristics of a PNG: PQ and HLG


def read_image(path: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """The pixels of an image file, H×W×3 uint8 RGB, upright and on white, and what there is to say about them.

    Raises:
        ImageError: no such file, no JPEG or PNG with 8 bits, damaged, or of a size that cannot be counted in.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(str(path), data)
        if data.startswith(MAGIC):
            return _png(str(path), data)
    except cv2.error:
        raise _unreadable(str(path)) from None
    raise ImageError(f"{path}: {_OTHERS}")


def _jpeg(name: str, data: bytes) -> tuple[NDArray[np.uint8], list[str]]:
    if not has_8_bits(data) or channels(data) == 4:  # four: CMYK, whose colours a profile decides
        raise ImageError(f"{name}: {_OTHERS}")
    size = next(sizes(data), None)
    if size is None:
        raise _unreadable(name)
    check_size(name, *size)
    pixels = _checked(name, imdecode(data, cv2.IMREAD_COLOR_RGB), size)
    found = damage(data)
    return pixels, [f"the JPEG data is damaged ({found}): the count may be wrong"] if found else []


def _png(name: str, data: bytes) -> tuple[NDArray[np.uint8], list[str]]:
    kinds = {kind for kind, _, _ in chunks(data)}
    transparent = data[25:26] in (b"\x04", b"\x06") or b"tRNS" in kinds
    if data[24:25] == b"\x10" or b"acTL" in kinds or (content(data, b"cICP") or b"")[1:2] in _HDR:
        raise ImageError(f"{name}: {_OTHERS}")
    if transparent and b"eXIf" in kinds:
        raise ImageError(f"{name}: a PNG that is transparent and may be turned is not supported; save it as JPEG")
    if any(end + 4 > len(data) for _, _, end in chunks(data)) or b"IEND" not in kinds:
        raise _unreadable(name)
    size = (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    check_size(name, *size)
    decoded = imdecode(data, cv2.IMREAD_UNCHANGED if transparent else cv2.IMREAD_COLOR_RGB)
    warnings = (
        ["the PNG data is damaged (a checksum does not match): the count may be wrong"] if is_damaged(data) else []
    )
    if not transparent:
        return _checked(name, decoded, size), warnings
    if decoded is None or decoded.dtype != np.uint8 or decoded.shape[2:] != (4,):
        raise ImageError(f"{name}: transparency of this kind is not supported; save it as JPEG")
    alpha = decoded[..., 3:].astype(np.uint16)
    if alpha.min() < 255:
        warnings.append("partly transparent: it is counted on white")
    pixels = (decoded[..., 2::-1] * alpha + 255 * (255 - alpha) + 127) // 255
    return _checked(name, pixels.astype(np.uint8), size), warnings


def _checked(name: str, pixels: NDArray[np.uint8] | None, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Decoded pixels of the size in the header, perhaps turned."""
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape not in ((*size, 3), (*size[::-1], 3)):
        raise _unreadable(name)
    return pixels


def _unreadable(name: str) -> ImageError:
    return ImageError(f"{name}: a damaged or truncated image")
