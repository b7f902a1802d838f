"""PGM, PPM and PFM: what Pillow reads slowly, or takes for another range."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TOKEN = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]{1,20})")
_COMMENT = re.compile(rb"#[^\r\n]*")
_CHANNELS = {b"P2": 1, b"P3": 3, b"P5": 1, b"P6": 3, b"Pf": 1, b"PF": 3}


@dataclass(frozen=True)
class Netpbm:
    """The header of a PGM, PPM or PFM file.

    Attributes:
        magic: ``P2``, ``P3`` (text), ``P5``, ``P6`` (binary), ``Pf``, ``PF`` (floats).
        width, height: in pixels.
        maximum: the sample that is white; of floats None.
        channels: 1 or 3.
        begins: where the samples begin.
        little: whether floats are little-endian.
    """

    magic: bytes
    width: int
    height: int
    maximum: int | None
    channels: int
    begins: int
    little: bool = False

    @property
    def bytes_per_pixel(self) -> int:
        """In memory, once read."""
        text = self.magic in (b"P2", b"P3")
        return self.channels * (4 if text or self.maximum is None else 1 if self.maximum < 256 else 2)

    def is_followed(self, data: bytes) -> bool:
        """Whether another image stands behind this one, as in a stream."""
        if self.magic in (b"P2", b"P3"):
            return False
        kind = 4 if self.maximum is None else 1 if self.maximum < 256 else 2
        end = self.begins + self.width * self.height * self.channels * kind
        return data[end : end + 8].lstrip()[:2] in (*_CHANNELS, b"P4", b"P7")

    def samples(self, data: bytes) -> NDArray[np.generic]:
        """The samples (h, w) or (h, w, 3), the topmost row first.

        Raises:
            ValueError: if there are too few.
        """
        shape = (self.height, self.width) if self.channels == 1 else (self.height, self.width, self.channels)
        number = self.height * self.width * self.channels
        if self.maximum is None:
            values = np.frombuffer(data, "<f4" if self.little else ">f4", number, self.begins)
            return values.reshape(shape)[::-1]
        if self.magic in (b"P5", b"P6"):
            kind = np.uint8 if self.maximum < 256 else np.dtype(">u2")
            return np.frombuffer(data, kind, number, self.begins).reshape(shape)
        text = _COMMENT.sub(b"", data[self.begins :]).decode("ascii")
        values = np.fromstring(text, np.int32, number, sep=" ")
        if values.min(initial=0) < 0:
            raise ValueError("samples below 0")
        return values.reshape(shape)


def read_header(data: bytes) -> Netpbm | None:
    """The header; None where the file is of another kind (bitmaps are left to Pillow).

    Raises:
        ValueError: if it is damaged.
    """
    magic = data[:2]
    if magic not in _CHANNELS or not data[2:3].isspace():
        return None
    tokens, at = [], 2
    for _ in range(3):
        found = _TOKEN.match(data, at)
        if found is None:
            raise ValueError("a damaged header")
        tokens.append(found[1])
        at = found.end()
    width, height = int(tokens[0]), int(tokens[1])
    if magic in (b"Pf", b"PF"):
        return Netpbm(magic, width, height, None, _CHANNELS[magic], at + 1, little=float(tokens[2]) < 0)
    maximum = int(tokens[2])
    if not 0 < maximum < 65536:
        raise ValueError(f"a largest value of {maximum}")
    return Netpbm(magic, width, height, maximum, _CHANNELS[magic], at + 1)
