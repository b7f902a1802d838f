"""What is refused before anything is decoded."""

from __future__ import annotations

from crowdexit.errors import CrowdExitError

MIN_SIDE = 32
MAX_PIXELS = 150_000_000
MAX_RATIO = 50  # of the longer side to the shorter
# Of one decoded copy in the file's own samples, so that this and the 8-bit RGB together stay below 1.5 GB.
MAX_BYTES = 900_000_000


class ImageError(CrowdExitError):
    """An image that cannot be read or is of no use."""


def check_size(name: str, width: int, height: int, bytes_per_pixel: int = 4) -> None:
    """Refuse an image by its size alone.

    Args:
        width, height: in pixels.
        bytes_per_pixel: of what the decoder makes of it.

    Raises:
        ImageError: if a side is below 32 pixels, or it is larger than 150 megapixels, more than 50 times as long as
            wide, or does not fit into the memory that an image may take.
    """
    size = f"{name}: {width}×{height}"
    if min(width, height) < MIN_SIDE:
        raise ImageError(f"{size} is too small to count in ({MIN_SIDE} at least)")
    if width * height > MAX_PIXELS:
        raise ImageError(f"{size} is too large ({MAX_PIXELS // 10**6} megapixels at most)")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ImageError(f"{size} is too long ({MAX_RATIO} times its shorter side at most); cut it into parts")
    if width * height * bytes_per_pixel > MAX_BYTES:
        most = MAX_BYTES // bytes_per_pixel // 10**6
        raise ImageError(f"{size} is too large ({most} megapixels at most with {bytes_per_pixel} bytes a pixel)")
