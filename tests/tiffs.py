"""TIFF files written field by field, for what no library writes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR, FORMAT = 256, 257, 258, 259, 262, 277, 284, 339
SUBFILE, ORIENTATION, SUB_IFDS = 254, 274, 330
_FORMATS = {"u": 1, "i": 2, "f": 3}


@dataclass
class Page:
    """One image of a TIFF file, uncompressed, in one strip.

    Attributes:
        pixels: (h, w) or (h, w, samples).
        tags: further fields or other values: tag → numbers.
        sub: pages that this one names as its sub-images.
        data: of the strip, where it is not the pixels as they are.
    """

    pixels: NDArray[np.generic]
    tags: Mapping[int, Sequence[int]] = field(default_factory=dict)
    sub: Sequence[Page] = ()
    data: bytes | None = None


def tiff(pages: Sequence[Page], *, order: Literal["<", ">"] = "<", big: bool = False) -> bytes:
    """The file, in that byte order; ``big``: a BigTIFF."""
    mark = b"II" if order == "<" else b"MM"
    out = bytearray(mark + (struct.pack(order + "HHHQ", 43, 8, 0, 0) if big else struct.pack(order + "HI", 42, 0)))
    link = 8 if big else 4  # where the offset of the next page belongs
    for page in pages:
        place, link_there = _write(out, page, order, big)
        struct.pack_into(order + ("Q" if big else "I"), out, link, place)
        link = link_there
    return bytes(out)


def _write(out: bytearray, page: Page, order: str, big: bool) -> tuple[int, int]:
    """Append a page; where it begins, and where the offset of the next one belongs."""
    sub = [_write(out, below, order, big)[0] for below in page.sub]
    height, width, *rest = page.pixels.shape
    samples = rest[0] if rest else 1
    planar = page.tags.get(PLANAR) == [2]
    raw = page.pixels.transpose(2, 0, 1) if planar else page.pixels
    data = raw.astype(raw.dtype.newbyteorder(order)).tobytes() if page.data is None else page.data
    strip = _append(out, data)
    plane = len(data) // samples
    tags: dict[int, Sequence[int]] = {
        WIDTH: [width],
        HEIGHT: [height],
        BITS: [8 * page.pixels.dtype.itemsize] * samples,
        COMPRESSION: [1],
        PHOTOMETRIC: [2 if samples >= 3 else 1],
        273: [strip + i * plane for i in range(samples)] if planar else [strip],
        SAMPLES: [samples],
        278: [height],
        279: [plane] * samples if planar else [len(data)],
        FORMAT: [_FORMATS[page.pixels.dtype.kind]] * samples,
        **({338: [2]} if samples in (2, 4) else {}),
        **({SUB_IFDS: sub} if sub else {}),
        **page.tags,
    }
    room = 8 if big else 4
    entries = []
    for tag, values in sorted(tags.items()):
        kind = 4 if tag in (WIDTH, HEIGHT, SUBFILE, 273, 278, 279, SUB_IFDS) else 3
        value = struct.pack(f"{order}{len(values)}{'I' if kind == 4 else 'H'}", *values)
        if len(value) > room:
            value = struct.pack(order + ("Q" if big else "I"), _append(out, value))
        entries.append(
            struct.pack(order + ("HHQ" if big else "HHI"), tag, kind, len(values)) + value.ljust(room, b"\0")
        )
    number = struct.pack(order + ("Q" if big else "H"), len(entries))
    place = _append(out, number + b"".join(entries))
    link = _append(out, bytes(room))
    return place, link


def _append(out: bytearray, data: bytes) -> int:
    place = len(out)
    out += data
    return place
