"""Pictures of which nobody has said what they show: a folder of them, read as a prepared file is."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdexit.data.picture import FORMATS, MAX_PIXELS, MIN_SIDE, SUFFIXES, read_picture
from crowdexit.data.store import StoredSample, StoreError


class PictureFolder:
    """A folder of pictures in the place of a prepared file: as many samples as it holds pictures, none with a truth.

    Attributes:
        path: the folder, looked through to the bottom; links to folders are not followed.
        skipped: how many files that are named like pictures are too small, too large or no pictures.

    Raises:
        StoreError: if there is no such folder, or no picture of use in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise StoreError(f"{path}: no such folder of pictures")
        named = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        sizes = {p.relative_to(path).as_posix(): _size(p) for p in named}
        self.sizes = {id: size for id, size in sizes.items() if size is not None}
        self._names = list(self.sizes)
        self.skipped = len(named) - len(self.sizes)
        if not self.sizes:
            raise StoreError(f"{path}: no picture of use in this folder")

    def ids(self, split: str, pattern: str = "*") -> list[str]:
        """The pictures' paths below the folder that match a shell pattern, by name."""
        return [id for id in self._names if fnmatchcase(id, pattern)]

    def labels(self, split: str) -> NDArray[np.int64]:
        """Zeros: nobody has said what they show."""
        return np.zeros(len(self.sizes), np.int64)

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """The middle square of a picture, (S, S, 3) uint8, RGB.

        Raises:
            PictureError: if it cannot be read.
        """
        picture = read_picture(self.path / self._names[index])
        height, width = picture.shape[:2]
        side = min(height, width)
        y, x = (height - side) // 2, (width - side) // 2
        return picture[y : y + side, x : x + side]

    def read(self, split: str, id: str, *, with_takes: bool = False) -> StoredSample:
        """A picture as a sample without heads and without sound.

        Raises:
            StoreError: if it cannot be read any more.
        """
        width, height = self.sizes[id]
        try:
            data = np.fromfile(self.path / id, np.uint8)
        except OSError as error:
            raise StoreError(f"{self.path / id}: cannot be read ({error.strerror})") from None
        return StoredSample(id, split, data, np.zeros((0, 2), np.float32), width, height, 0.0)


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) from a picture's header, or None if it is of no use."""
    try:
        with Image.open(path, formats=FORMATS) as picture:
            width, height = picture.size
    except Exception:  # whatever Pillow makes of a file that is none of its own
        return None
    return (width, height) if min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS else None
