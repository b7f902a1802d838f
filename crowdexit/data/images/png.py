"""PNG beyond Pillow: its chunks, by which it says how light is encoded and whether it is damaged."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

MAGIC = b"\x89PNG\r\n\x1a\n"


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, begin, end) of the content of each chunk, to the last one or the end of the file; ``end`` as it says."""
    at = len(MAGIC)
    while at + 8 <= len(data):
        kind, begin = data[at + 4 : at + 8], at + 8
        at = begin + int.from_bytes(data[at : at + 4], "big") + 4  # behind the checksum
        yield kind, begin, at - 4
        if kind == b"IEND":
            return


def content(data: bytes, wanted: bytes) -> bytes | None:
    """The content of the first chunk of that kind before the pixels; None where there is none."""
    for kind, begin, end in chunks(data):
        if kind == wanted:
            return data[begin:end]
        if kind == b"IDAT":
            break
    return None


def check_lengths(data: bytes) -> None:
    """Refuse a PNG with a chunk that is longer than the file: OpenCV reserves what a chunk claims, up to 2 GB.

    Raises:
        ValueError: for such a file.
    """
    if any(end + 4 > len(data) for _, _, end in chunks(data)):
        raise ValueError("a part of it is cut off, or its length is wrong")


def is_damaged(data: bytes) -> bool:
    """Whether a chunk with pixels or colours has another checksum than it says; Pillow does not look."""
    view = memoryview(data)
    return any(
        zlib.crc32(view[begin - 4 : end]) != int.from_bytes(data[end : end + 4], "big")
        for kind, begin, end in chunks(data)
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"tRNS") and end + 4 <= len(data)
    )
