"""Images and sounds of which nobody has said what they are: a folder of them, read as a prepared file is."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.image import MAX_PIXELS, MIN_SIDE, SUFFIXES, ImageError, read_header, read_pixels
from crowdexit.data.log_mel import read_audio
from crowdexit.data.mel import AudioError
from crowdexit.data.spectrogram import Spectrogram
from crowdexit.data.store import StoredSample, StoreError

AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".au")


def unlabelled_folder(path: Path, spectrogram: Spectrogram | None) -> ImageFolder | AudioFolder:
    """A folder of recordings, to be made the images that a set of sounds has; or for any other set, of images.

    Raises:
        StoreError: if nothing in it is of use.
    """
    return ImageFolder(path) if spectrogram is None else AudioFolder(path, spectrogram)


class ImageFolder:
    """A folder of images in the place of a prepared file: as many samples as it holds images, none with a truth.

    Attributes:
        path: the folder, looked through to the bottom; links to folders are not followed.
        skipped: how many files that are named like images are too small, too large or no images.

    Raises:
        StoreError: if there is no such folder, or no image of use in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise StoreError(f"{path}: no such folder of images")
        named = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        sizes = {p.relative_to(path).as_posix(): _size(p) for p in named}
        self.sizes = {id: size for id, size in sizes.items() if size is not None}
        self._names = list(self.sizes)
        self.skipped = len(named) - len(self.sizes)
        if not self.sizes:
            raise StoreError(f"{path}: no image of use in this folder")

    def describe(self) -> str:
        """How many there are, and how many were left out."""
        return _described("images", len(self._names), self.skipped)

    def ids(self, split: str, pattern: str = "*") -> list[str]:
        """The images' paths below the folder that match a shell pattern, by name."""
        return [id for id in self._names if fnmatchcase(id, pattern)]

    def labels(self, split: str) -> NDArray[np.int64]:
        """Zeros: nobody has said what they show."""
        return np.zeros(len(self.sizes), np.int64)

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """The middle square of an image, (S, S, 3) uint8, RGB.

        Raises:
            ImageError: if it cannot be read.
        """
        pixels = read_pixels(self.path / self._names[index])
        height, width = pixels.shape[:2]
        side = min(height, width)
        y, x = (height - side) // 2, (width - side) // 2
        return pixels[y : y + side, x : x + side]

    def read(self, split: str, id: str, *, with_takes: bool = False) -> StoredSample:
        """An image as a sample without heads and without audio.

        Raises:
            StoreError: if it cannot be read any more.
        """
        width, height = self.sizes[id]
        try:
            data = np.fromfile(self.path / id, np.uint8)
        except OSError as error:
            raise StoreError(f"{self.path / id}: cannot be read ({error.strerror})") from None
        return StoredSample(id, split, data, np.zeros((0, 2), np.float32), width, height, 0.0)


class AudioFolder:
    """A folder of recordings in the place of a prepared file of spectrograms, none with a truth.

    Args:
        path: the folder, looked through to the bottom; links to folders are not followed.
        spectrogram: how their images are made; of each recording its beginning is used.

    Attributes:
        skipped: how many files that are named like recordings hold no usable sound. Each is read once to know.

    Raises:
        StoreError: if there is no such folder, or no recording of use in it.
    """

    def __init__(self, path: Path, spectrogram: Spectrogram) -> None:
        self.path, self.spectrogram = path, spectrogram
        if not path.is_dir():
            raise StoreError(f"{path}: no such folder of recordings")
        named = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES and p.is_file())
        self._names = [p.relative_to(path).as_posix() for p in named if self._usable(p)]
        self.skipped = len(named) - len(self._names)
        if not self._names:
            raise StoreError(f"{path}: no recording of use in this folder")

    def describe(self) -> str:
        """How many there are, and how many were left out."""
        return _described("recordings", len(self._names), self.skipped)

    def ids(self, split: str) -> list[str]:
        """The recordings' paths below the folder, by name."""
        return list(self._names)

    def labels(self, split: str) -> NDArray[np.int64]:
        """Zeros: nobody has said what they are."""
        return np.zeros(len(self._names), np.int64)

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """The spectrogram of a recording, (size, size, 3) uint8.

        Raises:
            AudioError: if it cannot be read any more.
        """
        return self.spectrogram.of(*read_audio(self.path / self._names[index]))

    def _usable(self, path: Path) -> bool:
        try:
            self.spectrogram.of(*read_audio(path))
        except AudioError:
            return False
        return True


def _described(what: str, number: int, skipped: int) -> str:
    return f"{number} unlabelled {what}" + (f"; {skipped} unusable files skipped" if skipped else "")


def _size(path: Path) -> tuple[int, int] | None:
    """(width, height) of an image file as it is displayed, from its header, or None if it is of no use."""
    try:
        header = read_header(path)
    except ImageError:
        return None
    width, height = header.width, header.height
    return (width, height) if min(width, height) >= MIN_SIDE and width * height <= MAX_PIXELS else None
