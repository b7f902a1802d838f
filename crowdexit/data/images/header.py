"""What an image file's header says of its size, without decoding the image."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from crowdexit.data.images.limits import ImageError
from crowdexit.data.images.reader import FORMATS, orientation_of, upright_size


@dataclass(frozen=True)
class ImageHeader:
    """What the header of an encoded image says.

    Attributes:
        width, height: in pixels, as the image is displayed (:func:`crowdexit.data.images.reader.decode_image` gives
            that size).
        orientation: EXIF's, 1 to 8: how the stored pixels are mirrored and turned for display; 1 is not at all.
    """

    width: int
    height: int
    orientation: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the stored pixels."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(source: bytes | Path, name: str = "image") -> ImageHeader:
    """The header of an encoded image, from its bytes or its file.

    Raises:
        ImageError: if it is not an image, or its header is damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes and faults that the reader judges
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                orientation = orientation_of(image)
                return ImageHeader(*upright_size(image.size, orientation), orientation)
    except Exception as error:  # whatever Pillow makes of a file that is none of its own
        raise ImageError(f"{name}: not an image, or its header is damaged") from error
