"""Prepares class folders of images for classification: ``crowdexit prepare class-folders``."""

from __future__ import annotations

import stat
import sys
import tarfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Protocol
from zlib import crc32

import cv2
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image, ImageOps

from crowdexit.data.image import FORMATS, MIN_SIDE, SUFFIXES, ImageError, decode_pixels
from crowdexit.data.store import SPLITS
from crowdexit.errors import CrowdExitError

from .common import Destination, Size, Strict, Val, check_size, plain, run, shown
from .labelled import Labelled, prepare_classes
from .registry import DataSet

_SALT = 1  # see split_of
_DEPTH = 5  # folders below SRC that are looked into: a set needs two, and may lie within others

Place = tuple[str, ...]  # a path as its parts


@dataclass(frozen=True)
class LabelledImage(Labelled):
    """``place`` is where in the source it is; the id is that below the set's own folder."""

    place: Place


class Source(Protocol):
    """A folder or an archive: which files and folders there are below it, and what is in a file."""

    files: list[Place]
    folders: list[Place]

    def read(self, place: Place) -> bytes: ...

    def state(self) -> str: ...


DATA_SET = DataSet("Images in class folders", task="classification")
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="Folder of class folders, or a .tar of them.")],
    dst: Destination,
    size: Size = 224,
    val: Val = 0.1,
    strict: Strict = False,
) -> None:
    """Prepare images in class folders: one HDF5 file of square images and labels.

    SRC holds train/CLASS and test/CLASS, optionally val/CLASS; or CLASS alone. Without val/, a share of the
    training images, chosen by name alone, becomes `val`; of CLASS alone, another one as large becomes `test`.
    Each image is cropped to its central square. An interrupted run resumes.

    Example: crowdexit prepare class-folders pictures.tar data/pictures.h5 --size 224
    """
    if src.resolve() == dst.resolve():
        raise CrowdExitError(f"{dst}: would replace what it is made from")
    with open_source(src) as source:
        found = find_images(source, src, val)
        settings = f"class_folders {src.resolve()} {source.state()} {size} {val} {found.images}"
        prepare_classes(
            dst,
            found.classes,
            f"class folders of {src.name}",
            found.images,
            lambda image: square(decode(source.read(image.place), image.id), size),
            settings=settings,
            what="images",
            notes=lambda _: [f"{found.astray} images outside the class folders skipped"] if found.astray else [],
            strict=strict,
        )


class Folder:
    """A folder on the disk, as far down as a set of class folders reaches."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Place] = []
        self.folders: list[Place] = []
        try:
            self._visit(path, ())
        except OSError as error:
            raise CrowdExitError(f"{error.filename}: cannot be read ({error.strerror})") from error

    def _visit(self, folder: Path, place: Place) -> None:
        for path in sorted(folder.iterdir()):
            if path.is_dir():
                self.folders.append((*place, path.name))
                if len(place) + 1 < _DEPTH:  # also what ends a link that leads back up
                    self._visit(path, (*place, path.name))
            else:
                self.files.append((*place, path.name))

    def read(self, place: Place) -> bytes:
        path = self.path.joinpath(*place)
        try:
            about = path.stat()
            if not stat.S_ISREG(about.st_mode):  # a pipe would keep us waiting
                raise ImageError("not a file")
            check_size(about.st_size, "image")
            return path.read_bytes()
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})") from error

    def state(self) -> str:
        return "folder"


class Archive:
    """An uncompressed tar archive, read where it is; nothing is extracted, links are not followed."""

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path, self._tar = path, tar
        self._members: dict[Place, tarfile.TarInfo] = {}
        folders: dict[Place, None] = {}
        for member in tar:
            place = tuple(part for part in member.name.split("/") if part not in ("", "."))
            if not place or ".." in place:
                continue
            if member.isreg():
                self._members[place] = member
            folders.update((place[:n], None) for n in range(1, len(place) + member.isdir()))
        # tarfile takes a damaged header, or a cut between two members, for the end of the archive.
        with path.open("rb") as file:
            file.seek(tar.offset)
            end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError("no end of archive")
        self.files, self.folders = sorted(self._members), sorted(folders)

    def read(self, place: Place) -> bytes:
        member = self._members[place]
        check_size(member.size, "image")
        try:
            file = self._tar.extractfile(member)
            return file.read() if file else b""
        except (tarfile.TarError, OSError) as error:
            raise ImageError("damaged or cut short in the archive") from error

    def state(self) -> str:
        about = self.path.stat()
        return f"{about.st_size} {about.st_mtime_ns}"


@contextmanager
def open_source(src: Path) -> Iterator[Source]:
    """The folder or archive to read from.

    Raises:
        CrowdExitError: if it is neither, damaged, or a compressed archive.
    """
    if src.is_dir():
        yield Folder(src)
        return
    if not src.is_file():
        raise CrowdExitError(f"{src}: no such folder or archive")
    try:
        tar = tarfile.open(src, "r:")  # noqa: SIM115
    except (tarfile.TarError, OSError) as error:
        if src.suffix.lower() in (".tgz", ".gz", ".bz2", ".xz", ".zst"):
            raise CrowdExitError(f"{src}: a compressed archive; decompress it to a .tar first") from error
        raise CrowdExitError(f"{src}: neither a folder nor a tar archive, or damaged") from error
    with tar:
        try:
            source = Archive(src, tar)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise CrowdExitError(f"{src}: damaged or cut short") from error
        yield source


@dataclass
class Found:
    """The classes of a source, its images, and how many more lie in no class folder."""

    classes: list[str]
    images: list[LabelledImage]
    astray: int


def find_images(source: Source, src: Path, val: float) -> Found:
    """The images in class folders, each with its split and label; classes in alphabetical order.

    Raises:
        CrowdExitError: as :func:`find_samples`.
    """
    samples = find_samples(source, src, SUFFIXES, "image")

    def split(id: str, half: str) -> str:
        if not samples.halves:
            return split_of(id, val, test=True)
        return half if half != "train" or "val" in samples.halves else split_of(id, val)

    images = [LabelledImage(one.id, split(one.id, one.half), one.label, one.place) for one in samples.found]
    return Found(samples.classes, images, samples.astray)


@dataclass(frozen=True)
class Sample:
    """A file in a class folder. ``half`` is the folder above that, as ``train``, or empty if there is none."""

    id: str
    half: str
    label: int
    place: Place


@dataclass
class Samples:
    """The classes of a source, the files in their folders, and how many more lie elsewhere."""

    classes: list[str]
    found: list[Sample]
    astray: int

    @property
    def halves(self) -> set[str]:
        """Which splits have folders of their own; none if there are class folders alone."""
        return {sample.half for sample in self.found} - {""}


def find_samples(source: Source, src: Path, suffixes: tuple[str, ...], what: str) -> Samples:
    """The files of some kind in class folders, SPLIT/CLASS or CLASS alone; classes in alphabetical order.

    Args:
        source: where to look.
        src: its name, for errors.
        suffixes: that the names of these files end in, in lower case.
        what: how such a file is called in errors.

    Raises:
        CrowdExitError: if there are fewer than two classes, a class folder without such a file, or a class with
            nothing to train on.
    """
    files = [place for place in source.files if not hidden(place) and place[-1].lower().endswith(suffixes)]
    outer = _outer(files)
    # A class may be called "test" as well; then its files lie one folder higher than those of a split.
    halves = any(len(place) == outer + 3 and place[outer] in SPLITS for place in files)
    depth = outer + (3 if halves else 2)

    def in_set(place: Place) -> bool:
        return not hidden(place) and (not halves or place[outer] in SPLITS)

    mine = [place for place in files if len(place) == depth and in_set(place)]
    filled = {place[outer:-1] for place in mine}  # (SPLIT, CLASS) or (CLASS,)
    for folder in source.folders:
        if len(folder) == depth - 1 and in_set(folder) and folder[outer:] not in filled:
            raise CrowdExitError(f"{src}: the class folder {shown('/'.join(folder))} holds no {what}")
    classes = sorted({folder[-1] for folder in filled})
    if len(classes) < 2:
        example = f"train/CLASS/*{suffixes[0]} or CLASS/*{suffixes[0]}"
        raise CrowdExitError(f"{src}: holds no two class folders of {what}s ({example})")
    for name in classes:
        if not plain(name):
            raise CrowdExitError(f"{src}: the name of the class folder {shown(name)} is not plain text")
        if halves and ("train", name) not in filled:
            others = " and ".join(split for split in SPLITS if (split, name) in filled)
            raise CrowdExitError(f"{src}: class {name!r} is in {others} only, so it has no training samples")
    labels = {name: number for number, name in enumerate(classes)}
    found = [
        Sample("/".join(place[outer:]), place[outer] if halves else "", labels[place[-2]], place) for place in mine
    ]
    return Samples(classes, found, len(files) - len(mine))


def hidden(place: Place) -> bool:
    """What is not meant as content; macOS archives hold a ``._NAME.jpg`` beside each image."""
    return any(part.startswith(".") or part == "__MACOSX" for part in place)


def _outer(files: Sequence[Place]) -> int:
    """In how many folders, one in the other, the whole set lies (archives often begin with one)."""
    outer = 0
    while (
        files
        and all(len(place) > outer + 2 for place in files)
        and len({place[outer] for place in files}) == 1
        and files[0][outer] not in SPLITS
    ):
        outer += 1
    return outer


def split_of(id: str, val: float, *, test: bool = False) -> str:
    """The split of an image, fixed by its id alone: ``val``, with ``test`` an equal share of that, or ``train``.

    The salted CRC-32, taken as a fraction of its range, is below the share ``val``, or below twice that.
    """
    fraction = crc32(f"{_SALT} {id}".encode(errors="surrogateescape")) / 2**32
    if fraction < val:
        return "val"
    return "test" if test and fraction < 2 * val else "train"


def decode(data: bytes, name: str) -> NDArray[np.uint8]:
    """An image as :func:`crowdexit.data.image.decode_pixels` reads it, H×W×3 RGB, and also a smaller one.

    Raises:
        ImageError: if it is damaged or no image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which decode_pixels judges
            image = Image.open(BytesIO(data), formats=FORMATS)
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError):
        return decode_pixels(data, name)  # which says what is wrong
    with image:
        small = min(image.size) < MIN_SIDE and max(image.size) <= MIN_SIDE**2
        if not small or image.mode.startswith("I"):  # of 16 bits, which need more than a conversion
            return decode_pixels(data, name)
        try:
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise ImageError(f"{name}: a damaged or truncated image ({error})") from None


def square(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The middle square of an image, its shorter side wide, at size×size; one of that size stays as it is.

    It is cut out before it is resized: a long thin image would grow beyond all memory the other way round.
    """
    height, width = image.shape[:2]
    side = min(height, width)
    y, x = (height - side) // 2, (width - side) // 2
    middle = np.ascontiguousarray(image[y : y + side, x : x + side])
    if side == size:
        return middle
    interpolation = cv2.INTER_AREA if size < side else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(middle, (size, size), interpolation=interpolation), np.uint8)


if __name__ == "__main__":
    sys.exit(run(app))
