"""What the preparation scripts share: workers, progress, resuming, skipped samples, summary, exit code."""

from __future__ import annotations

import codecs
import hashlib
import multiprocessing
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, TypeVar

import cv2
import h5py
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from scipy.io import loadmat

from crowdexit.data.density import split_inside
from crowdexit.data.image import ImageError, ImageHeader, decode_pixels, read_header
from crowdexit.data.store import CHECKSUMS, FORMAT, StoredSample, open_for_writing, write_sample
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command
from crowdexit.utils.files import write_problem

from .registry import RESUMES

JPEG_QUALITY = 95
DENSITY_STRIDE = 8  # stored density maps have the grid that the networks answer on
MAX_BYTES = 2**28  # of one image or recording

CORES = os.cpu_count() or 1
Destination = Annotated[
    Path, typer.Argument(metavar="DST.h5", help="The prepared file to write.", callback=command.output_file)
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, show_default="all cores", help="Processes that work at once.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop with code 2 at the first unusable sample.")]
Size = Annotated[int, typer.Option("--size", min=8, max=2048, help="Width and height of the stored images.")]
StoredPixels = Annotated[
    bool,
    typer.Option(
        "--stored-pixels",
        help="The set is annotated in the stored pixels: turn its heads with images that EXIF turns for display.",
    ),
]
Val = Annotated[float, typer.Option("--val", min=0.01, max=0.4, help="Share for validation (and for test).")]

Skipped = list[tuple[str, str]]  # what cannot be used: id and reason


@dataclass(frozen=True)
class Task:
    """A sample to be made. Scripts add the files that it is made from."""

    id: str
    split: str


@dataclass
class Report:
    """What a run has done; all but ``skipped`` and ``resumed`` is read back from the file.

    ``outside``: by id, how many heads lay outside the image and were dropped. ``turned``: the ids of images that EXIF
    turns for display. ``stored_pixels``: whether these were annotated in the stored pixels.
    """

    destination: Path
    resumed: int = 0
    skipped: Skipped = field(default_factory=list)
    images: Counter[str] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    turned: list[str] = field(default_factory=list)
    stored_pixels: bool = False

    @property
    def heads_outside(self) -> int:
        """How many heads lay outside their images, and were dropped."""
        return self.outside.total()

    def print(self) -> None:
        print(f"{self.destination.name}: {self.images.total()} images, {self.heads.total():,.0f} heads")
        for split, images in self.images.items():
            print(f"  {split:5} {images:6} images {self.heads[split]:10,.0f} heads")
        for origin, images in self.origins.items():
            print(f"  counts from {origin}: {images} images")
        if self.resumed:
            print(f"  {self.resumed} images resumed from an interrupted run")
        if self.heads_outside:
            print(f"  {self.heads_outside} heads outside their images dropped")
        if self.turned:
            taken = "stored pixels, and turned with them" if self.stored_pixels else "displayed image"
            print(f"  {len(self.turned)} images are rotated by EXIF; their heads are read in the {taken}")
        print_skipped(self.skipped, "samples")
        self._warn()

    def _warn(self) -> None:
        """Heads outside their images are a sign of annotations that do not fit; on stderr, with the number."""
        if not self.heads_outside:
            return
        (worst, dropped), *others = self.outside.most_common()
        most = f"{worst}: {dropped}" if not others else f"the most in {worst}: {dropped}"
        all_heads = self.heads.total() + self.heads_outside
        line = f"warning: {self.heads_outside} of {all_heads:,.0f} heads lie outside their images ({most})"
        if not self.outside.keys().isdisjoint(self.turned):
            other = "without" if self.stored_pixels else "with"
            line += f"; some of these images are rotated by EXIF: try it {other} --stored-pixels"
        print(line, file=sys.stderr)


def print_skipped(skipped: Skipped, what: str) -> None:
    """The end of a summary: how many could not be used, and each with its reason."""
    if skipped:
        print(f"  {len(skipped)} {what} skipped:")
    for id, reason in skipped:
        print(f"    {id}: {reason}")


def progress_bar() -> Progress:
    """On stderr, so that the summary can be sent elsewhere."""
    columns = TextColumn("preparing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=Console(stderr=True))


T = TypeVar("T", bound=Task)


def prepare(
    destination: Path,
    tasks: Sequence[T],
    make: Callable[[T], StoredSample],
    *,
    settings: str,
    jobs: int = CORES,
    strict: bool = False,
) -> Report:
    """Make every task's sample, in several processes, into one prepared file.

    An interrupted run is gone on with, if it had the same settings. The file appears under its name only
    when it is whole. Call it from under ``if __name__ == "__main__"``.

    Args:
        destination: the HDF5 file; one that is there already is replaced at the end.
        tasks: what to make; ids are unique within a split.
        make: makes one sample; both it and the tasks can be pickled. It raises ``CrowdExitError`` for a
            sample that cannot be used, which is then skipped and named in the report.
        settings: all that the samples depend on but their ids.
        jobs: processes, by default one a core; with 1 the work is done in this process.
        strict: raise at the first sample that cannot be used.

    Raises:
        CrowdExitError: if nothing could be prepared, ``destination`` cannot be written, or by ``strict``.
    """
    report = Report(destination)
    part = destination.with_name(destination.name + ".part")
    fingerprint = hashlib.sha256(f"{FORMAT} {settings}".encode()).hexdigest()
    if destination.is_dir():
        raise CrowdExitError(f"{destination}: a folder, not a file to write to")
    written = 0
    try:
        done = _already_done(part, fingerprint)
        written = len(done)
        todo = [task for task in tasks if (task.split, task.id) not in done]
        report.resumed = len(tasks) - len(todo)
        with (
            open_for_writing(destination) as file,
            closing(_work(todo, make, jobs)) as results,
            progress_bar() as progress,
        ):
            file.attrs["prepared_with"] = fingerprint
            for task, result in progress.track(results, len(todo)):
                if isinstance(result, CrowdExitError):
                    if strict:
                        raise CrowdExitError(f"{task.id}: {result}")
                    report.skipped.append((task.id, str(result)))
                    continue
                write_sample(file, result)
                file.flush()  # what is on the disk stays readable if the run is killed
                written += 1
            _read_back(file, report)
            if not report.images:
                file.close()
                part.unlink()
                first = ": ".join(report.skipped[0]) if report.skipped else "there is none"
                raise CrowdExitError(f"no sample could be prepared; {first}")
    except OSError as error:
        kept = "nothing is kept; free some space and start again"
        if written:
            kept = f"{written} samples are kept in {part.name}; free some space, and the same command resumes it"
        raise CrowdExitError(write_problem(destination, error, kept=kept)) from error
    report.skipped.sort()
    return report


def _already_done(part: Path, fingerprint: str) -> set[tuple[str, str]]:
    """(split, id) of the whole samples in an interrupted run's file; one of other settings is removed."""
    if not part.is_file():
        return set()
    try:
        with h5py.File(part, "r") as file:
            if file.attrs.get("prepared_with") == fingerprint:
                return {(s, id) for s, group in file.items() for id in group if CHECKSUMS in group[id].attrs}
    except BlockingIOError as error:
        raise CrowdExitError(f"{part}: another run is writing it") from error
    except Exception:  # killed in the middle of a write: HDF5 has many for it, and it is started anew
        pass
    part.unlink()
    return set()


def _read_back(file: h5py.File, report: Report) -> None:
    for split, group in file.items():
        for id, sample in group.items():
            report.images[split] += 1
            report.heads[split] += sample.attrs["count"]
            if outside := int(sample.attrs.get("heads_outside", 0)):
                report.outside[id] = outside
            if "exif_orientation" in sample.attrs:
                report.turned.append(id)
            report.stored_pixels |= sample.attrs.get("annotated_in") == "stored pixels"
            if "count_from" in sample.attrs:
                report.origins[sample.attrs["count_from"]] += 1


def _attempt(make: Callable[[T], StoredSample], task: T) -> StoredSample | CrowdExitError:
    try:
        return make(task)
    except CrowdExitError as error:
        return error
    except OSError as error:
        return CrowdExitError(f"{Path(error.filename or '').name}: cannot be read ({error.strerror})")


def _start_worker() -> None:
    cv2.setNumThreads(1)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _work(
    tasks: Sequence[T], make: Callable[[T], StoredSample], jobs: int
) -> Generator[tuple[T, StoredSample | CrowdExitError], None, None]:
    """Each task and its result, as they get ready."""
    jobs = min(jobs, len(tasks))
    if jobs <= 1:
        yield from ((task, _attempt(make, task)) for task in tasks)
        return
    # Workers fork from a fresh server: threads of this process and its open file are not copied into them.
    # The server imports the script, and with it all that is slow to import, once for all workers.
    context = multiprocessing.get_context("forkserver")
    module, main = getattr(make, "func", make).__module__, sys.modules["__main__"].__spec__
    scripts = [module] if module != "__main__" else [main.name] if main else []
    context.set_forkserver_preload([f"{__package__}.worker_server", *scripts])
    pool = ProcessPoolExecutor(jobs, context, _start_worker)
    waiting: dict[Future[StoredSample | CrowdExitError], T] = {}
    left = iter(tasks)
    try:
        while True:
            # A few ahead of the writer and no more, so that results do not pile up in memory.
            while len(waiting) < 3 * jobs and (task := next(left, None)) is not None:
                waiting[pool.submit(_attempt, make, task)] = task
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                yield waiting.pop(future), future.result()
    except BrokenProcessPool as error:
        raise CrowdExitError("a worker process died, perhaps out of memory; try fewer --jobs") from error
    finally:
        pool.shutdown(cancel_futures=True)


def plain(name: str) -> bool:
    """Whether a name can be stored and shown: no bytes of another encoding, no control characters."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)


def shown(name: str) -> str:
    return name if plain(name) else ascii(name)


def check_size(size: int, what: str) -> None:
    """Refuse a file of ``size`` bytes that is too large to be read as a whole.

    Raises:
        CrowdExitError: if it is.
    """
    if size > MAX_BYTES:
        raise CrowdExitError(f"{size:,} bytes are too much for a {what}")


def by_hash(names: Iterable[str]) -> list[str]:
    """The names, each once, in an order that only the names decide and that has nothing to do with them."""
    return sorted(set(names), key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())


def divided(names: Iterable[str], val: float, *, test: bool = True) -> dict[str, str]:
    """A split for each name: the share ``val`` for validation, with ``test`` as many for test, the rest to train on.

    The hashes of the names decide. Both parts get at least one, as long as one stays to train on.
    """
    ordered = by_hash(names)
    parts = ("val", "test") if test else ("val",)
    each = min(max(1, round(val * len(ordered))), max(0, len(ordered) - 1) // len(parts))
    held = {name: part for n, part in enumerate(parts) for name in ordered[n * each : (n + 1) * each]}
    return {name: held.get(name, "train") for name in ordered}


def run(app: typer.Typer, arguments: Sequence[str] | None = None) -> int:
    """Run a script's command; see :func:`crowdexit.utils.command.run`."""
    return command.run(app, arguments, interrupted=RESUMES)


@dataclass(frozen=True)
class SourceImage:
    """An image file: its bytes (n,) uint8, its header, and its pixels as they are displayed, H×W×3 uint8 RGB."""

    data: NDArray[np.uint8]
    header: ImageHeader
    pixels: NDArray[np.uint8]

    @property
    def origin(self) -> dict[str, str]:
        """What a sample keeps of the header: nothing of an image that is displayed as it is stored."""
        return {} if self.header.orientation == 1 else {"exif_orientation": str(self.header.orientation)}


def read_image(path: Path) -> SourceImage:
    """Read an image file whole, as counting does.

    Raises:
        CrowdExitError: if it is missing, damaged, cut short, not an image, or of a size that cannot be counted in.
    """
    if not path.is_file():
        raise CrowdExitError(f"no image {path.name}")
    check_size(path.stat().st_size, "image")
    data = path.read_bytes()
    try:
        pixels = decode_pixels(data, path.name)
        return SourceImage(np.frombuffer(data, np.uint8), read_header(data, path.name), pixels)
    except ImageError as error:
        reason = str(error).removeprefix(f"{path.name}: ")
        raise CrowdExitError(f"the image {path.name} is damaged or of no use ({reason})") from error


def heads_of(
    heads: NDArray[np.float64], header: ImageHeader, *, stored_pixels: bool
) -> tuple[NDArray[np.float32], int]:
    """An image's annotated heads (N, 2) in the displayed image, and how many lie outside it and are left out.

    Args:
        stored_pixels: whether they are annotated in the stored pixels; they are turned with these then.
    """
    width, height = header.stored_size if stored_pixels else (header.width, header.height)
    inside, outside = split_inside(heads, height, width)
    if stored_pixels:
        inside = displayed_points(inside, header)
    return inside, outside


def displayed_points(points: NDArray[np.float32], header: ImageHeader) -> NDArray[np.float32]:
    """Points (N, 2) of the stored pixels, where they lie in the displayed image."""
    width, height = header.stored_size
    x, y = points[:, 0], points[:, 1]
    columns = {
        1: (x, y),
        2: (width - x, y),
        3: (width - x, height - y),
        4: (x, height - y),
        5: (y, x),
        6: (height - y, x),
        7: (height - y, width - x),
        8: (y, width - x),
    }[header.orientation]
    # What lay on the left or upper border must not come to lie on the right or lower one, which is outside.
    last = np.nextafter(np.array([header.width, header.height], np.float32), np.float32(0))
    return np.minimum(np.stack(columns, axis=1), last)


def displayed_matrix(matrix: NDArray[Any], orientation: int) -> NDArray[Any]:
    """A matrix of the stored pixels (h, w), turned as EXIF turns these for display."""
    turns: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
        1: lambda m: m,
        2: np.fliplr,
        3: lambda m: np.rot90(m, 2),
        4: np.flipud,
        5: np.transpose,
        6: lambda m: np.rot90(m, -1),
        7: lambda m: np.rot90(m, 2).T,
        8: np.rot90,
    }
    return turns[orientation](matrix)


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The files of a folder by their names without the ending, which is one of ``suffixes`` in any case.

    Hidden files are left out; a folder that is not there has none.
    """
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() in suffixes and not path.name.startswith("."):
            found.setdefault(path.stem, []).append(path)
    return found


def read_lines(path: Path, errors: str = "strict") -> list[str]:
    """The lines of a text file in UTF-8 or UTF-16, with or without a byte-order mark.

    Args:
        errors: what becomes of bytes that are no text, as of :meth:`bytes.decode`.

    Raises:
        CrowdExitError: if it is neither.
    """
    data = path.read_bytes()
    encoding = "utf-8-sig"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif b"\0" in data:  # of the letters of a list, UTF-16 has a zero in every other byte
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
    try:
        text = data.decode(encoding, errors)
    except UnicodeDecodeError as error:
        raise CrowdExitError(f"{path.name} is not text in UTF-8 or UTF-16") from error
    if "\0" in text:
        raise CrowdExitError(f"{path.name} is not text in UTF-8 or UTF-16")
    return text.splitlines()


def resized(
    pixels: NDArray[np.uint8],
    points: NDArray[np.float32],
    width: int,
    height: int,
    canvas: tuple[int, int] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """An image H×W×3 at another size as JPEG bytes, (n,) uint8, and its heads moved with it, (N, 2) float32.

    With ``canvas``, a width and height, it lies in the upper left of a black image of that size.
    """
    size = np.array([width, height], np.float32)
    image = Image.fromarray(pixels)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    if canvas:
        scaled = scaled.crop((0, 0, *canvas))
    buffer = BytesIO()
    scaled.save(buffer, "JPEG", quality=JPEG_QUALITY)
    # A head just inside must not come to lie on the border through rounding.
    moved = np.minimum(points * (size / image.size).astype(np.float32), np.nextafter(size, np.float32(0)))
    return np.frombuffer(buffer.getvalue(), np.uint8), moved


def read_mat(path: Path) -> dict[str, Any]:
    """The variables of a MATLAB file by name (up to version 7; nothing is unpickled).

    Raises:
        CrowdExitError: if the file is missing or damaged.
    """
    if not path.is_file():
        raise CrowdExitError(f"no file {path.name}")
    check_size(path.stat().st_size, "MATLAB file")
    try:
        found = loadmat(path)
    except NotImplementedError as error:  # how scipy refuses that format
        raise CrowdExitError(f"{path.name} is a MATLAB 7.3 file; save it as version 7") from error
    except Exception as error:  # a damaged file can fail in the reader anywhere and anyhow
        raise CrowdExitError(f"{path.name} is damaged or no MATLAB file") from error
    return {name: value for name, value in found.items() if not name.startswith("__")}


def heads_in_mat(path: Path) -> NDArray[np.float64]:
    """The heads in a MATLAB file, (N, 2), x y in pixels.

    ``image_info`` as ShanghaiTech publishes it (a cell with a struct whose field is ``location``), a struct with such
    a field, or one numeric N×2 array, whatever the variables are called.

    Raises:
        CrowdExitError: if it is missing or damaged, or has none of these or several.
    """
    variables = read_mat(path)
    variables = {"image_info": variables["image_info"]} if "image_info" in variables else variables
    arrays = list(_arrays(variables))
    located = [array for name, array in arrays if name.rpartition(".")[2].lower() == "location"]
    # Without any head it is often an empty matrix of another shape.
    heads = located or [array for _, array in arrays if array.ndim == 2 and array.shape[1] == 2 and array.size]
    if not heads and len(arrays) == 1 and arrays[0][1].size == 0:
        heads = [arrays[0][1]]
    if len(heads) != 1 or (heads[0].size and (heads[0].ndim != 2 or heads[0].shape[1] != 2)):
        there = ", ".join(f"{name} {'×'.join(map(str, array.shape))}" for name, array in arrays[:8]) or "no numbers"
        raise CrowdExitError(
            f"{path.name}: expected heads as 'image_info' with a field location, or one array N×2; found {there}"
        )
    return heads[0].astype(np.float64).reshape(-1, 2)


def _arrays(value: Any, name: str = "") -> Iterator[tuple[str, NDArray[Any]]]:
    """The numeric arrays within MATLAB variables, structs and cells, each with the names that lead to it."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from _arrays(one, f"{name}.{key}" if name else key)
    elif isinstance(value, np.void) and value.dtype.names:
        for key in value.dtype.names:
            yield from _arrays(value[key], f"{name}.{key}")
    elif isinstance(value, np.ndarray) and (value.dtype.names or value.dtype == object):
        for one in value.flat:
            yield from _arrays(one, name)
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        yield name, value
