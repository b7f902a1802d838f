"""Prepares Fashion MNIST (Xiao et al., 2017) for classification: ``crowdexit prepare fashion-mnist``."""

from __future__ import annotations

import gzip
import struct
import sys
import zlib
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crowdexit.data.classes import ClassStore, stratified, write_classes
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command

from .registry import STARTS_AGAIN, DataSet

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
FILES = tuple(f"{half}-{kind}-ubyte" for half in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
SIDE = 28
TRAIN_PER_VAL = 6  # of 60,000 training images one in six is for validation
_MAX_IMAGES = 200_000  # more are no Fashion MNIST, and might not fit into memory

DATA_SET = DataSet("Fashion MNIST (Xiao et al., 2017)", task="classification", resumes=False)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of train-images-idx3-ubyte.gz and the three others.")
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST.h5", help="The prepared file to write.", callback=command.output_file)
    ],
) -> None:
    """Prepare Fashion MNIST: one HDF5 file of images, grey in three channels, and labels.

    A sixth of the training images becomes `val`, the same in every run and as many of each class: 50,000,
    10,000 and 10,000 images. The four files may be compressed (.gz) or not.

    Example: crowdexit prepare fashion-mnist FashionMNIST/raw data/fashion-mnist.h5
    """
    if not src.is_dir():
        raise CrowdExitError(f"{src}: no such folder")
    columns = TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        found = {name: read_idx(find(src, name)) for name in progress.track(FILES)}
    halves = [(found[FILES[i]], found[FILES[i + 1]]) for i in (0, 2)]
    for (images, labels), name in zip(halves, ("train", "t10k"), strict=True):
        if len(images) != len(labels):
            raise CrowdExitError(f"{src}: {name} has {len(images)} images and {len(labels)} labels")
    (images, labels), (test, test_labels) = halves
    val = stratified(labels, len(images) // TRAIN_PER_VAL)
    with write_classes(dst, CLASSES, "Fashion MNIST (Xiao et al., 2017)") as writer:
        for split, chosen in (("train", np.flatnonzero(~val)), ("val", np.flatnonzero(val))):
            writer.add(split, coloured(images[chosen]), labels[chosen], [f"train/{i:05d}" for i in chosen])
        writer.add("test", coloured(test), test_labels, [f"t10k/{i:05d}" for i in range(len(test))])
    with ClassStore(dst) as store:
        print(store.describe())


def coloured(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Grey images (n, H, W) as (n, H, W, 3)."""
    return np.repeat(images[..., None], 3, axis=3)


def find(src: Path, name: str) -> Path:
    """The file of this name, compressed or not; its letters may be capitals.

    Raises:
        CrowdExitError: if it is not there.
    """
    there = {path.name.lower(): path for path in src.iterdir() if path.is_file()}
    for wanted in (f"{name}.gz", name):
        if wanted in there:
            return there[wanted]
    raise CrowdExitError(f"{src}: no file {name}.gz")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file: images (n, 28, 28) uint8 or labels (n,) uint8, as its name says.

    What it declares is checked before anything is read by it.

    Raises:
        CrowdExitError: if it is damaged, shorter or longer than it declares, or declares what cannot be.
    """
    shape_of_one = (SIDE, SIDE) if "images" in path.name.lower() else ()
    kind = "images" if shape_of_one else "labels"
    magic = 0x0800 + 1 + len(shape_of_one)  # unsigned bytes, and the number of dimensions
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            head = file.read(4 + 4 * (1 + len(shape_of_one)))
            if len(head) < 4 + 4 * (1 + len(shape_of_one)):
                raise CrowdExitError(f"{path.name} is cut short in its first bytes")
            found, n, *sides = struct.unpack(f">{len(head) // 4}I", head)
            if found != magic:
                raise CrowdExitError(
                    f"{path.name} is no idx file of {kind} (it begins {found:#010x}, not {magic:#010x})"
                )
            if tuple(sides) != shape_of_one:
                raise CrowdExitError(f"{path.name} declares images of {sides[1]}×{sides[0]}, not {SIDE}×{SIDE}")
            if not 0 < n <= _MAX_IMAGES:
                raise CrowdExitError(f"{path.name} declares {n:,} {kind}; that cannot be")
            size = n * int(np.prod(shape_of_one, dtype=int))
            data = file.read(size + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CrowdExitError(f"{path.name} is damaged or cut short") from error
    except OSError as error:
        raise CrowdExitError(f"{path.name}: cannot be read ({error.strerror})") from error
    if len(data) < size:
        raise CrowdExitError(f"{path.name} is cut short: it declares {n} {kind} and ends before the last")
    if len(data) > size:
        raise CrowdExitError(f"{path.name} is longer than the {n} {kind} that it declares")
    return np.frombuffer(data, np.uint8).reshape(n, *shape_of_one)


def run(arguments: list[str] | None = None) -> int:
    """Run the command; see :func:`crowdexit.utils.command.run`."""
    return command.run(app, arguments, interrupted=STARTS_AGAIN)


if __name__ == "__main__":
    sys.exit(run())
