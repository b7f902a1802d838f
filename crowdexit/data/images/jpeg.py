"""JPEG beyond Pillow: where an image ends and what follows it, and what libjpeg says of damage."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import BinaryIO

import cv2

from crowdexit.data.images.opencv import imdecode

_BEGINS = b"\xff\xd8\xff"
# In a scan, what is not a stuffed byte, a restart or padding ends it.
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
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
        size, at = _walk(data, at + 2)
        if size is not None:
            yield size
        at = data.find(_BEGINS, at)


def has_8_bits(data: bytes) -> bool:
    """Whether a JPEG has 8 bits and is compressed with loss, as decoders here know it; True where no header says."""
    at = 2
    while (found := _MARKER.search(data, at)) is not None:
        kind, at = data[found.start() + 1], found.end()
        if kind in _FRAMES:
            return data[at + 2 : at + 3] == b"\x08" and kind not in (0xC3, 0xC7, 0xCB, 0xCF)
        if kind not in _ALONE:
            at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return True


def _walk(data: bytes, at: int) -> tuple[tuple[int, int] | None, int]:
    """The size of an image from behind its first marker, and where it ends."""
    size = None
    while (found := _MARKER.search(data, at)) is not None:
        kind, at = data[found.start() + 1], found.end()
        if kind == 0xD9:
            break
        if kind == 0xD8:  # another one begins: this one has no end
            return size, found.start()
        if kind in _ALONE:
            continue
        if kind in _FRAMES and size is None:
            size = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 3 : at + 5], "big")
        at += max(2, int.from_bytes(data[at : at + 2], "big"))
    return size, at if found is not None else len(data)


def damage(data: bytes) -> str | None:
    """What libjpeg has to say of an image's compressed data; None: all is well, or nobody can tell.

    libjpeg decodes through damage and prints a warning on the standard error, which Pillow suppresses and OpenCV does
    not. So it is decoded once more, at an eighth of its size, with that turned into a file meanwhile; what others print
    there in that time comes a moment later.
    """
    with _lock, tempfile.TemporaryFile() as said:
        try:
            sys.stderr.flush()
            kept = os.dup(2)
        except (OSError, ValueError, AttributeError):  # there is no standard error
            return None
        try:
            os.dup2(said.fileno(), 2)
            imdecode(data, cv2.IMREAD_REDUCED_GRAYSCALE_8, False)
        except cv2.error:
            pass
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        return _sorted_out(said)


def _sorted_out(said: BinaryIO) -> str | None:
    said.seek(0)
    told = None
    for line in said.read().decode("utf-8", "replace").splitlines(keepends=True):
        found = _DAMAGE.match(line.strip())
        if found is not None:
            told = told or found[1] or found[2]
        elif not line.startswith(_HARMLESS) and _BY_OPENCV not in line:
            sys.stderr.write(line)
    return told
