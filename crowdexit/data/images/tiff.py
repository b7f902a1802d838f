"""TIFF beyond Pillow: which page is the image, camera raw, and samples of more than eight bits."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.images.opencv import imdecode

_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
_OFFSETS, _ORIENTATION, _SAMPLES, _LENGTHS, _MAXIMUM, _PLANAR = 273, 274, 277, 279, 281, 284
_TILE_OFFSETS, _SUB_IFDS, _EXTRA, _FORMAT = 324, 330, 338, 339
_DNG_VERSION, _CFA_PATTERN = 50706, 33422
_RAW_PHOTOMETRIC = {32803, 34892}  # a colour filter array, linear raw
# Of Nikon, Pentax, Sony, Samsung, Kodak and Epson; none of them is read by any library of images.
_RAW_COMPRESSION = {34713, 34892, 32767, 32769, 32770, 32772, 65000, 65535}
# Nothing of these is needed, and other libraries fail at odd values: resolution, what cameras and editors add; the
# orientation is applied here.
_IGNORED = {_ORIENTATION, 282, 283, 296, 700, 33723, 34377, 34665, 34853, 40965}
_PRIVATE = 65534
_TYPES = {1: "B", 3: "H", 4: "I", 6: "b", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MOST_PAGES = 1000
_MOST_FIELDS = 4096
_MOST_VALUES = 1_000_000


# Compressions that the TIFF library may have been built without, by their numbers.
_OPTIONAL_COMPRESSIONS = {34887: "LERC", 34925: "LZMA", 50000: "Zstandard", 50001: "WebP"}
_DEPTH = 32997


class UnsupportedTiff(ValueError):
    """A kind of TIFF that nothing here reads.

    Attributes:
        remedy: what to do.
    """

    def __init__(self, kind: str, remedy: str = "save it with 8 bits") -> None:
        super().__init__(kind)
        self.remedy = remedy


@dataclass(frozen=True)
class _Field:
    kind: int
    count: int
    at: int  # where its values stand
    entry: int  # where its entry in the directory stands


class Page:
    """One image of a TIFF file.

    Args:
        data: the file.
        at: where its directory begins.
    """

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self.at = data, at
        self._order = "<" if data[:2] == b"II" else ">"
        self._big = data[2:4] in (b"\x2b\x00", b"\x00\x2b")
        self._fields: dict[int, _Field] = {}
        count_size, field_size, inline = (8, 20, 8) if self._big else (2, 12, 4)
        (number,) = self._unpack("Q" if self._big else "H", at)
        if number > _MOST_FIELDS:
            raise ValueError("a directory that is damaged")
        for index in range(number):
            place = at + count_size + index * field_size
            tag, kind = self._unpack("HH", place)
            (count,) = self._unpack("Q" if self._big else "I", place + 4)
            where = place + 4 + (8 if self._big else 4)
            if count * _SIZES.get(kind, 1) > inline:
                (where,) = self._unpack("Q" if self._big else "I", where)
            self._fields[tag] = _Field(kind, count, where, place)
        (self.next,) = self._unpack("Q" if self._big else "I", at + count_size + number * field_size)

    def _unpack(self, form: str, at: int) -> tuple[int, ...]:
        try:
            return struct.unpack_from(self._order + form, self._data, at)
        except (struct.error, OverflowError):
            raise ValueError("a directory that is cut short") from None

    def numbers(self, tag: int) -> tuple[int, ...]:
        """The whole numbers of a field; empty without one, or where it is of another type."""
        field = self._fields.get(tag)
        if field is None or field.kind not in _TYPES or field.count > _MOST_VALUES:
            return ()
        try:
            return self._unpack(f"{field.count}{_TYPES[field.kind]}", field.at)
        except ValueError:
            return ()

    def number(self, tag: int, default: int = 0) -> int:
        """The first number of a field."""
        return (*self.numbers(tag), default)[0]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as stored."""
        return self.number(_WIDTH), self.number(_HEIGHT)

    @property
    def orientation(self) -> int:
        """As of EXIF; 1 where it does not say."""
        return self.number(_ORIENTATION, 1)

    @property
    def reduced(self) -> bool:
        """Whether it says that it is a smaller version of another page, or a mask."""
        return bool(self.number(_SUBFILE) & 5) or self.number(_OLD_SUBFILE) == 2

    @property
    def raw(self) -> bool:
        """Whether it holds a sensor's samples."""
        return (
            self.number(_PHOTOMETRIC) in _RAW_PHOTOMETRIC
            or self.number(_COMPRESSION) in _RAW_COMPRESSION
            or _CFA_PATTERN in self._fields
        )

    @property
    def dng(self) -> bool:
        """Whether it says that the file is a DNG."""
        return _DNG_VERSION in self._fields

    @property
    def channels(self) -> int:
        """Samples of a pixel."""
        return self.number(_SAMPLES, 1)

    @property
    def bits(self) -> int:
        """The most bits of a sample."""
        return max(self.numbers(_BITS) or (1,))

    @property
    def format(self) -> int:
        """1: unsigned, 2: signed, 3: floating."""
        return self.number(_FORMAT, 1)

    @property
    def deep(self) -> bool:
        """Whether its samples are not unsigned with eight bits at most, and not of a kind that Pillow alone knows."""
        return (self.bits > 8 or self.format in (2, 3)) and self.number(_PHOTOMETRIC) <= 2

    @property
    def bytes_per_pixel(self) -> int:
        """Of the decoded samples."""
        return self.channels * -(-self.bits // 8) if self.deep else 4

    @property
    def maximum(self) -> int | None:
        """The sample that is white, where the file says so; MaxSampleValue does only where it names a depth."""
        if self.bits % 8:  # decoded into the upper bits of the next wider type
            return (1 << -(-self.bits // 8) * 8) - 1
        stated = self.number(_MAXIMUM)
        return stated if self.format == 1 and 255 <= stated < 2**self.bits and stated & (stated + 1) == 0 else None

    def check_supported(self) -> None:
        """Refuse a volume, of which only one plane would be read.

        Raises:
            UnsupportedTiff: for several planes in depth.
        """
        if self.number(_DEPTH, 1) > 1:
            raise UnsupportedTiff("several planes in depth", "save each as an image")

    @property
    def optional_compression(self) -> str | None:
        """The name of a compression that cannot be read everywhere, or None."""
        return _OPTIONAL_COMPRESSIONS.get(self.number(_COMPRESSION, 1))

    @property
    def is_jpeg(self) -> bool:
        """Whether its pixels are compressed as JPEG."""
        return self.number(_COMPRESSION, 1) in (6, 7)

    @property
    def ycbcr(self) -> bool:
        """Whether it has luma and chroma without JPEG, which Pillow takes for RGB."""
        return self.number(_PHOTOMETRIC) == 6 and self.number(_COMPRESSION, 1) not in (6, 7)

    @property
    def white_is_zero(self) -> bool:
        return _PHOTOMETRIC in self._fields and self.number(_PHOTOMETRIC) == 0

    def sub_pages(self) -> Iterator[Page]:
        """Those that this one names as its own; damaged ones are left out."""
        for at in self.numbers(_SUB_IFDS)[:64]:
            try:
                yield Page(self._data, at)
            except ValueError:
                continue

    def alone(self) -> bytes:
        """The file with this page as its first, without what nobody else is to look at, and not to be turned."""
        out = bytearray(self._data)
        struct.pack_into(self._order + ("Q" if self._big else "I"), out, 8 if self._big else 4, self.at)
        for tag, field in self._fields.items():
            if tag in _IGNORED:
                struct.pack_into(self._order + "H", out, field.entry, _PRIVATE)
        return bytes(out)

    def samples(self) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Of a deep page the colours (h, w, 1 or 3), grey or red, green, blue, and the opacity (h, w, 1) or None.

        Raises:
            UnsupportedTiff: for a kind that nothing here decodes.
            ValueError: if it is damaged.
        """
        if self.number(_COMPRESSION, 1) == 1 and _TILE_OFFSETS not in self._fields and self.bits % 8 == 0:
            samples, order = self._uncompressed(), slice(0, 3)
        else:
            samples, order = self._decoded(), slice(2, None, -1)
        colours = 3 if self.channels >= 3 else 1
        opacity = self.numbers(_EXTRA)[:1] in ((1,), (2,))
        return (
            samples[..., order] if colours == 3 else samples[..., :1],
            samples[..., colours : colours + 1] if opacity and self.channels > colours else None,
        )

    def _decoded(self) -> NDArray[Any]:
        """By OpenCV, so that its colours are blue, green, red (h, w, channels)."""
        kind = f"{self.bits}-bit{' floating-point' if self.format == 3 else ''} samples"
        if self.number(_PLANAR, 1) == 2 and self.channels > 1:  # OpenCV would read past the planes
            raise UnsupportedTiff(f"compressed {kind} in separate planes")
        if self.channels not in (1, 3, 4) or (self.format == 3 and self.bits < 32) or self.bits > 64:
            raise UnsupportedTiff(f"compressed {kind}, {self.channels} to a pixel")
        decoded = imdecode(self.alone())
        if decoded is None or decoded.dtype.itemsize * 8 < self.bits:
            raise UnsupportedTiff(kind)
        return decoded.reshape(self.size[1], self.size[0], self.channels)

    def _uncompressed(self) -> NDArray[Any]:
        width, height = self.size
        formats, bits = set(self.numbers(_FORMAT) or (1,)), set(self.numbers(_BITS))
        if len(bits) != 1 or len(formats) != 1:
            raise UnsupportedTiff("samples of several kinds")
        if self.bits not in ((16, 32, 64) if self.format == 3 else (8, 16, 32, 64)):
            raise UnsupportedTiff(f"{self.bits}-bit samples")
        kind = np.dtype(f"{self._order}{'uif'[self.format - 1]}{self.bits // 8}")
        strips = zip(self.numbers(_OFFSETS), self.numbers(_LENGTHS), strict=True)
        joined = b"".join(self._data[at : at + length] for at, length in strips)
        samples = np.frombuffer(joined, kind, width * height * self.channels)
        if self.number(_PLANAR, 1) == 2:
            return samples.reshape(self.channels, height, width).transpose(1, 2, 0)
        return samples.reshape(height, width, self.channels)


def pages_of(data: bytes) -> list[Page]:
    """The pages of a file in their order; the directory of a later one that is damaged ends the list.

    Raises:
        ValueError: if it is no TIFF, or not even its first directory can be read.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 16:
        raise ValueError("no TIFF")
    version = struct.unpack_from(order + "H", data, 2)[0]
    at = struct.unpack_from(order + ("Q" if version == 43 else "I"), data, 8 if version == 43 else 4)[0]
    pages: list[Page] = []
    seen: set[int] = set()
    while at and at not in seen and len(pages) < _MOST_PAGES:
        seen.add(at)
        try:
            pages.append(Page(data, at))
        except ValueError:
            if not pages:
                raise
            break
        at = pages[-1].next
    return pages


def is_raw(data: bytes, pages: list[Page]) -> bool:
    """Whether a file is a camera's raw file, of which other pages are but previews."""
    if data[8:10] == b"CR" and data[:2] == b"II":  # Canon's CR2
        return True
    return any(page.dng or page.raw or any(sub.raw for sub in page.sub_pages()) for page in pages)


def image_page(pages: list[Page]) -> tuple[Page, int]:
    """The page to count, and how many other images are left out.

    It is the largest, the first of several as large; one that says it is a smaller version of another, or a mask, only
    where there is nothing else. Where that is all that the file's own pages are, their sub-images are looked at.
    """
    whole = [page for page in pages if not page.reduced]
    if not whole:
        whole = [sub for page in pages for sub in page.sub_pages() if not sub.reduced]
    candidates = whole or pages
    chosen = max(candidates, key=lambda page: page.size[0] * page.size[1])
    return chosen, len(candidates) - 1
