"""JPEG beyond Pillow: where an image ends and what follows it, and what libjpeg says of damage."""

from __future__ import annotations

import os
import re
import struct
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import cv2

from crowdexit.data.images.opencv import imdecode

_BEGINS = b"\xff\xd8\xff"
# In a scan, what is not a stuffed byte, a restart or padding ends it.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_LOSSLESS = {0xC3, 0xC7, 0xCB, 0xCF}
_ALONE = {0x01, *range(0xD0, 0xD9)}  # markers without a length
# libjpeg's words for data that is not as it was written; its other warnings are of headers that do not matter.
# In a TIFF they come by way of libtiff and OpenCV, who write something before them.
_DAMAGE = re.compile(
    r"(?:.*JPEGLib: )?(?:Corrupt JPEG data: (?!bad ICC)(.*)|(Premature end of JPEG file|Inconsistent progression.*))"
)
_HARMLESS = ("Warning: unknown JFIF", "Unknown Adobe", "Corrupt JPEG data", "Invalid SOS parameters")
_BY_OPENCV = "grfmt_tiff.cpp"  # what else OpenCV says of a TIFF, which Pillow decodes
_lock = threading.Lock()


def sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """(width, height) of each JPEG image that stands in a file one behind the other, as in a motion JPEG stream.

    Images within another's segments (thumbnails) are not among them.
    """
    at = data.find(_BEGINS)
    while at >= 0:
        frame, at = _find_frame(data, at + 2)
        if frame is not None:
            yield frame.size
        at = data.find(_BEGINS, at)


def has_8_bits(data: bytes) -> bool:
    """Whether a JPEG has 8 bits and is compressed with loss, as decoders here know it; True where no header says."""
    frame, _ = _find_frame(data, 2)
    return frame is None or (frame.bits == 8 and frame.kind not in _LOSSLESS)


def channels(data: bytes) -> int:
    """How many values a pixel of a JPEG has: 1, 3, or 4 (CMYK); 0 where no header says."""
    frame, _ = _find_frame(data, 2)
    return 0 if frame is None else frame.channels


class _Frame(NamedTuple):
    """The header of an image's pixels: its marker, bits of a sample, (width, height), values of a pixel."""

    kind: int
    bits: int
    size: tuple[int, int]
    channels: int


def _find_frame(data: bytes, at: int) -> tuple[_Frame | None, int]:
    """The header of an image from behind its first marker, and where the image ends."""
    frame = None
    while (found := _MARKER.search(data, at)) is not None:
        kind, at = data[found.start() + 1], found.end()
        if kind == 0xD9:
            break
        if kind == 0xD8:  # another one begins: this one has no end
            return frame, found.start()
        if kind in _ALONE:
            continue
        if kind in _FRAMES and frame is None and at + 8 <= len(data):
            bits, height, width, channels = struct.unpack_from(">BHHB", data, at + 2)
            frame = _Frame(kind, bits, (width, height), channels)
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return frame, at if found is not None else len(data)


def damage(data: bytes) -> str | None:
    """What libjpeg has to say of an image's compressed data; None: all is well, or nobody can tell.

    libjpeg decodes through damage and prints a warning on the standard error, which Pillow suppresses and OpenCV does
    not. So it is decoded once more, at an eighth of its size, with that turned into a file meanwhile; what others print
    there in that time comes a moment later.
    """
    with _lock, tempfile.TemporaryFile() as captured:
        try:
            sys.stderr.flush()
            kept = os.dup(2)
        except (OSError, ValueError, AttributeError):  # there is no standard error
            return None
        try:
            os.dup2(captured.fileno(), 2)
            imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8, False)
        except cv2.error:
            pass
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        return _first_warning(captured)


def _first_warning(captured: BinaryIO) -> str | None:
    captured.seek(0)
    problem = None
    for line in captured.read().decode("utf-8", "replace").splitlines(keepends=True):
        found = _DAMAGE.match(line.strip())
        if found is not None:
            problem = problem or found[1] or found[2]
        elif not line.startswith(_HARMLESS) and _BY_OPENCV not in line:
            sys.stderr.write(line)
    return problem
