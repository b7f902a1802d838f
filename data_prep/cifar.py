"""Prepares CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) for classification: ``crowdexit prepare cifar``."""

from __future__ import annotations

import pickle
import sys
import tarfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from lzma import LZMAError
from pathlib import Path
from pickletools import genops
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crowdexit.data.classes import ClassStore, stratified, write_classes
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command

from .registry import STARTS_AGAIN, DataSet

SIDE = 32
TRAIN_PER_VAL = 5  # of 50,000 training images one in five is for validation
_MAX_BYTES = 2**28  # of one file; the largest that is published has 155 MB


@dataclass(frozen=True)
class Published:
    """How one of the two sets is published: the names of its files and of the lists in them."""

    name: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    fine: tuple[str, str]  # keys of the labels and of the classes' names
    coarse: tuple[str, str] | None = None

    @property
    def files(self) -> tuple[str, ...]:
        return (self.meta, *self.train, self.test)


CIFAR_10 = Published(
    name="CIFAR-10",
    folder="cifar-10-batches-py",
    train=tuple(f"data_batch_{n}" for n in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    fine=("labels", "label_names"),
)
CIFAR_100 = Published(
    name="CIFAR-100",
    folder="cifar-100-python",
    train=("train",),
    test="test",
    meta="meta",
    fine=("fine_labels", "fine_label_names"),
    coarse=("coarse_labels", "coarse_label_names"),
)
BOTH = (CIFAR_10, CIFAR_100)

DATA_SET = DataSet("CIFAR-10 and CIFAR-100 (Krizhevsky, 2009)", task="classification", resumes=False)
app = typer.Typer(add_completion=False)


@app.command()
def main(
    src: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="cifar-10-batches-py or cifar-100-python, what it lies in, or the .tar.gz."),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST.h5", help="The prepared file to write.", callback=command.output_file)
    ],
    fine: Annotated[
        bool, typer.Option("--fine/--coarse", help="CIFAR-100's 100 classes, or the 20 groups of them.")
    ] = True,
) -> None:
    """Prepare CIFAR-10 or CIFAR-100 ("python version"): one HDF5 file of images and labels.

    A fifth of the training images becomes `val`, the same in every run and as many of each class: 40,000,
    10,000 and 10,000 images. The archive is read without extracting it, and its pickles are read as data
    only: they cannot run code.

    Example: crowdexit prepare cifar cifar-10-python.tar.gz data/cifar10.h5
    """
    if src.resolve() == dst.resolve():
        raise CrowdExitError(f"{dst}: would replace what it is made from")
    published, batches = read_all(src)
    keys = published.fine if fine else published.coarse
    if keys is None:
        raise CrowdExitError(f"{src}: {published.name} has no coarse classes")
    classes = read_names(batches[published.meta], keys[1], published.meta)
    images = np.concatenate([read_images(batches[name], name) for name in published.train])
    labels = np.concatenate([read_labels(batches[name], keys[0], name) for name in published.train])
    # By the fine classes in either case, so that --coarse has the same split.
    strata = np.concatenate([read_labels(batches[name], published.fine[0], name) for name in published.train])
    ids = [f"{name}/{i:05d}" for name in published.train for i in range(len(read_images(batches[name], name)))]
    val = stratified(strata, len(images) // TRAIN_PER_VAL)
    kind = "" if published.coarse is None else f", {'fine' if fine else 'coarse'} classes"
    with write_classes(dst, classes, f"{published.name} (Krizhevsky, 2009), python version{kind}") as writer:
        for split, chosen in (("train", np.flatnonzero(~val)), ("val", np.flatnonzero(val))):
            writer.add(split, images[chosen], labels[chosen], [ids[i] for i in chosen])
        test = batches[published.test]
        images, labels = read_images(test, published.test), read_labels(test, keys[0], published.test)
        writer.add("test", images, labels, [f"{published.test}/{i:05d}" for i in range(len(images))])
    with ClassStore(dst) as store:
        print(store.describe())


def read_all(src: Path) -> tuple[Published, dict[str, dict[str, Any]]]:
    """Which of the two sets is there, and what its files hold, by their names.

    Raises:
        CrowdExitError: if there is none or more than one, or a file is missing, damaged or not of its form.
    """
    batches: dict[str, dict[str, Any]] = {}
    columns = TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    published = None
    with (
        closing(_from_folder(src) if src.is_dir() else _from_archive(src)) as files,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        bar = progress.add_task("", total=None)
        for published, name, data in files:
            batches[name] = read_batch(data, name)
            progress.update(bar, completed=len(batches), total=len(published.files))
            if len(batches) == len(published.files):
                return published, batches
    if published is None:
        raise CrowdExitError(f"{src}: holds neither {CIFAR_10.folder} nor {CIFAR_100.folder}")
    missing = [name for name in published.files if name not in batches]
    raise CrowdExitError(f"{src}: {published.name} without its {' and '.join(missing)}")


def _from_folder(src: Path) -> Generator[tuple[Published, str, bytes]]:
    found = [(one, folder) for one in BOTH for folder in (src, src / one.folder) if (folder / one.meta).is_file()]
    if len(found) > 1:
        raise CrowdExitError(f"{src}: holds both {found[0][1].name} and {found[1][1].name}; name one of them")
    for published, folder in found:
        for name in published.files:
            path = folder / name
            try:
                if path.is_file():
                    _check_size(name, path.stat().st_size)
                    yield published, name, path.read_bytes()
            except OSError as error:
                raise CrowdExitError(f"{path}: cannot be read ({error.strerror})") from error


def _from_archive(src: Path) -> Generator[tuple[Published, str, bytes]]:
    if not src.is_file():
        raise CrowdExitError(f"{src}: no such file or folder")
    names = {f"{one.folder}/{name}": (one, name) for one in BOTH for name in one.files}
    first = None
    try:
        with tarfile.open(src, "r:*") as archive:
            for member in archive:
                published, name = names.get(member.name, (None, ""))
                if published is None or not member.isreg():
                    continue
                first = first or published
                if published is not first:
                    raise CrowdExitError(f"{src}: holds both {first.folder} and {published.folder}")
                _check_size(name, member.size)
                data = archive.extractfile(member)
                yield published, name, data.read() if data else b""
    except (tarfile.TarError, EOFError, OSError, LZMAError, zlib.error) as error:
        raise CrowdExitError(f"{src}: damaged, cut short or no tar archive") from error


def _check_size(name: str, size: int) -> None:
    if size > _MAX_BYTES:
        raise CrowdExitError(f"{name} has {size:,} bytes, far more than any file of CIFAR")


def read_batch(data: bytes, name: str) -> dict[str, Any]:
    """What a pickled file of CIFAR holds, by key; arrays as (n, 3072) uint8. Nothing in it is run.

    Raises:
        CrowdExitError: if it asks for anything that no such file needs, is damaged or not of this form.
    """
    try:
        for opcode, argument, _ in genops(data):
            # The unpickler would make room for as many as the number says, however short the file is.
            if opcode.name in ("PUT", "LONG_BINPUT") and (argument or 0) > len(data):
                raise CrowdExitError("is refused: it indexes beyond its own length")
        content = BatchUnpickler(BytesIO(data), encoding="bytes").load()
    except CrowdExitError as error:
        raise CrowdExitError(f"{name} {error}") from error
    except Exception as error:  # a damaged pickle can fail anywhere and anyhow
        raise CrowdExitError(f"{name} is damaged, cut short or not of CIFAR's python version") from error
    if not isinstance(content, dict):
        raise CrowdExitError(f"{name} holds no dictionary")
    return {_text(key): value.values if isinstance(value, _Array) else value for key, value in content.items()}


def _text(value: object) -> str:
    """The published pickles are Python 2's, whose texts arrive as bytes."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def read_images(batch: dict[str, Any], name: str) -> NDArray[np.uint8]:
    """The images of a batch, (n, 32, 32, 3) uint8, RGB; published are rows of 1024 red, green, blue values.

    Raises:
        CrowdExitError: if there are none or they are not of this form.
    """
    rows = batch.get("data")
    if not isinstance(rows, np.ndarray) or rows.shape[1] != 3 * SIDE * SIDE or not len(rows):
        raise CrowdExitError(f"{name} holds no images as rows of {3 * SIDE * SIDE} values")
    return rows.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)


def read_labels(batch: dict[str, Any], key: str, name: str) -> NDArray[np.int64]:
    """The labels of a batch under a key, (n,), as many as it has images.

    Raises:
        CrowdExitError: if they are missing, too few or too many, or not small numbers.
    """
    labels = batch.get(key)
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise CrowdExitError(f"{name} holds no labels {key!r}")
    if len(labels) != len(batch["data"]):
        raise CrowdExitError(f"{name} holds {len(batch['data'])} images and {len(labels)} {key}")
    return np.array(labels, np.int64)


def read_names(meta: dict[str, Any], key: str, name: str) -> list[str]:
    """The names of the classes.

    Raises:
        CrowdExitError: if they are missing.
    """
    names = meta.get(key)
    if not isinstance(names, list) or not all(isinstance(text, bytes | str) for text in names):
        raise CrowdExitError(f"{name} holds no {key!r}")
    return [_text(text) for text in names]


class BatchUnpickler(pickle.Unpickler):
    """Reads a pickle of lists, numbers, texts and uint8 arrays; whatever else one can ask for is refused.

    What it may name is not even NumPy's own: a pickle that reaches the true ``dtype`` and ``ndarray`` can make
    bytes be taken for pointers (an object dtype whose flags are set to 0), so stand-ins take the arguments.
    """

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise CrowdExitError(f"is refused: it refers to {module!r} {name!r}, which is not image data") from None


class _Admitted:
    """A function that a pickle may call and not change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise CrowdExitError("is refused: it tries to change a function")


class _Array:
    """An array being read: empty, until its state comes. ``values`` is (n, m) uint8."""

    __slots__ = ("values",)

    def __init__(self, *_: object) -> None:
        self.values = np.zeros((0, 0), np.uint8)

    def __setstate__(self, state: object) -> None:
        match state:
            case (1, (int(rows), int(columns)), _Uint8(), False | 0, bytes(raw)):
                self.values = np.frombuffer(raw, np.uint8).reshape(rows, columns)
            case _:
                raise CrowdExitError("is refused: it holds an array that is not two-dimensional uint8")


class _Uint8:
    """The one dtype there is; its state (byte order and flags) says nothing about bytes."""

    __slots__ = ()

    def __init__(self, kind: object, *_: object) -> None:
        if _text(kind) not in ("u1", "|u1", "uint8"):
            raise CrowdExitError("is refused: it holds an array that is not of type uint8")

    def __setstate__(self, state: object) -> None:
        pass


def _encode(text: str, codec: object) -> bytes:
    """By which Python 3 writes bytes in protocol 2."""
    if _text(codec) != "latin1":
        raise CrowdExitError("is refused: its bytes are encoded otherwise than arrays are")
    return text.encode("latin1")


def _no_call(*_: object) -> None:
    raise CrowdExitError("is refused: it makes an array otherwise than arrays are pickled")


# NumPy's module had another name until version 2.
_ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): _Admitted(_Array),
    ("numpy._core.multiarray", "_reconstruct"): _Admitted(_Array),
    ("numpy", "ndarray"): _Admitted(_no_call),  # only handed to _reconstruct
    ("numpy", "dtype"): _Admitted(_Uint8),
    ("_codecs", "encode"): _Admitted(_encode),
}


def run(arguments: list[str] | None = None) -> int:
    """Run the command; see :func:`crowdexit.utils.command.run`."""
    return command.run(app, arguments, interrupted=STARTS_AGAIN)


if __name__ == "__main__":
    sys.exit(run())
