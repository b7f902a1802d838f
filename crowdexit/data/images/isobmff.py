"""HEIF and AVIF as boxes: what their decoders do not say of them."""

from __future__ import annotations

from collections.abc import Iterator

from crowdexit.data.hdr import Primaries, Transfer

# Brands of image files; sequences of images too (ISO/IEC 23008-12, AVIF 1.1).
_BRANDS = (b"mif1", b"mif2", b"msf1", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"avif", b"avis", b"jpeg")
# As numbered in ITU-T H.273.
TRANSFERS: dict[int, Transfer] = {16: "pq", 18: "hlg"}
PRIMARIES: dict[int, Primaries] = {1: "bt709", 9: "bt2020", 11: "p3", 12: "p3"}


def is_image(head: bytes) -> bool:
    """Whether a file's first bytes are those of HEIF or AVIF."""
    return head[4:8] == b"ftyp" and head[8:12] in _BRANDS


def is_cut_short(data: bytes) -> bool:
    """Whether a box of the outermost level is longer than the file: decoders make images of what is left."""
    return any(end > len(data) for end in _ends(data))


def nclx(data: bytes) -> tuple[int, ...]:
    """(primaries, transfer) of the first colour description, as numbered in ITU-T H.273; nothing without one."""
    at = data.find(b"colrnclx")
    if at < 0:
        return ()
    return int.from_bytes(data[at + 8 : at + 10], "big"), int.from_bytes(data[at + 10 : at + 12], "big")


def _ends(data: bytes) -> Iterator[int]:
    """Where each box of the outermost level says that it ends."""
    at = 0
    while at + 8 <= len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if size < 8:  # 0: to the end of the file
            return
        at += size
        yield at
