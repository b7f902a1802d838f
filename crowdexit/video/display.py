"""How decoded frames are meant to be shown: the shape of their pixels, and what their values stand for."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from av.video.reformatter import ColorPrimaries, ColorTrc

from crowdexit.data.hdr import Primaries, Transfer

SQUARE = Fraction(1)
# No video format has pixels that are longer than three times their width; beyond this it is an error.
MOST_ASPECT = 5

_UNSPECIFIED = (0, ColorTrc.UNSPECIFIED)
_HDR: dict[int, Transfer] = {ColorTrc.SMPTE2084: "pq", ColorTrc.ARIB_STD_B67: "hlg"}
_PRIMARIES: dict[int, Primaries] = {
    ColorPrimaries.BT709: "bt709",
    ColorPrimaries.SMPTE431: "p3",
    ColorPrimaries.SMPTE432: "p3",
}
# Neither those of displays nor HDR: shown as they are, they are much too dark or too bright.
_UNSUPPORTED = {
    ColorTrc.LINEAR: "linear light",
    ColorTrc.LOG: "a logarithmic curve",
    ColorTrc.LOG_SQRT: "a logarithmic curve",
    ColorTrc.SMPTE428: "the curve of digital cinema (SMPTE ST 428-1)",
}
_ICTCP = 14  # AVCOL_SPC_ICTCP, which PyAV has no name for


@dataclass(frozen=True)
class Display:
    """How a frame is shown.

    Attributes:
        pixel_aspect: width of a pixel, of its height, before the frame is turned upright.
        transfer: of HDR, how light is encoded; None: not HDR. primaries: of HDR, the colors of its channels.
        warnings: what cannot be shown as it is meant, one line each.
    """

    pixel_aspect: Fraction = SQUARE
    transfer: Transfer | None = None
    primaries: Primaries = "bt2020"
    warnings: tuple[str, ...] = ()

    def size(self, width: int, height: int) -> tuple[int, int]:
        """The (width, height) of such a frame in square pixels. One side grows, so that no detail is lost."""
        if self.pixel_aspect >= 1:
            return round(width * self.pixel_aspect), height
        return width, round(height / self.pixel_aspect)


AS_STORED = Display()


class StreamDisplay:
    """Says of each frame of a stream how it is shown, when it has just been decoded.

    What the container states about pixels holds, as in FFmpeg's own players; else what the codec does, which may change
    from frame to frame. About light it is the other way round.

    Args:
        stream: of which nothing has been decoded yet.
    """

    def __init__(self, stream: Any) -> None:
        self._codec = stream.codec_context
        stated, coded = _aspect(stream), _aspect(self._codec)
        self._stated_aspect = stated if stated != coded else None
        self._stated_transfer, self._stated_primaries = self._codec.color_trc, self._codec.color_primaries

    def of(self, image: Any) -> Display:
        """How FFmpeg's frame is shown."""
        warnings = []
        aspect = self._stated_aspect or _aspect(self._codec) or SQUARE
        if not 1 / Fraction(MOST_ASPECT) <= aspect <= MOST_ASPECT:
            shape = f"{aspect.numerator}:{aspect.denominator}"
            warnings.append(f"its pixel aspect ratio of {shape} is implausible; assuming square pixels")
            aspect = SQUARE
        transfer = self._stated_transfer if image.color_trc in _UNSPECIFIED else image.color_trc
        primaries = self._stated_primaries if image.color_primaries in _UNSPECIFIED else image.color_primaries
        if transfer in _UNSUPPORTED:
            warnings.append(f"its light is encoded by {_UNSUPPORTED[transfer]}, which is not supported; convert it")
        if image.colorspace == _ICTCP:
            warnings.append("its colors are encoded as ICtCp, which is not supported; convert it")
        return Display(aspect, _HDR.get(transfer), _PRIMARIES.get(primaries, "bt2020"), tuple(warnings))


def _aspect(of: Any) -> Fraction | None:
    """The pixel aspect ratio of a stream or a codec; None where none is stated, or one with a zero."""
    with suppress(ZeroDivisionError):
        aspect: Fraction | None = of.sample_aspect_ratio
        if aspect is not None and aspect > 0:
            return aspect
    return None
