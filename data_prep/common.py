"""What the preparation scripts share: workers, progress, resuming, skipped samples, summary, exit code."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
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

from crowdexit import command
from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from crowdexit.errors import CrowdExitError

JPEG_QUALITY = 95
DENSITY_STRIDE = 8  # stored density maps have the grid that the networks answer on
MAX_BYTES = 2**28  # of one picture or recording

CORES = os.cpu_count() or 1
Jobs = Annotated[int, typer.Option("--jobs", min=1, show_default="all cores", help="Processes that work at once.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop with code 2 at the first unusable sample.")]
Size = Annotated[int, typer.Option("--size", min=8, max=2048, help="Width and height of the stored pictures.")]
Val = Annotated[float, typer.Option("--val", min=0.01, max=0.4, help="Share for validation (and for test).")]

Skipped = list[tuple[str, str]]  # what cannot be used: id and reason


@dataclass(frozen=True)
class Task:
    """A sample to be made. Scripts add the files that it is made from."""

    id: str
    split: str


@dataclass
class Report:
    """What a run has done; all but ``skipped`` and ``resumed`` is read back from the file."""

    destination: Path
    resumed: int = 0
    skipped: Skipped = field(default_factory=list)
    pictures: Counter[str] = field(default_factory=Counter)
    heads: Counter[str] = field(default_factory=Counter)
    origins: Counter[str] = field(default_factory=Counter)
    heads_outside: int = 0

    def print(self) -> None:
        print(f"{self.destination.name}: {self.pictures.total()} pictures, {self.heads.total():,.0f} heads")
        for split, pictures in self.pictures.items():
            print(f"  {split:5} {pictures:6} pictures {self.heads[split]:10,.0f} heads")
        for origin, pictures in self.origins.items():
            print(f"  counts from {origin}: {pictures} pictures")
        if self.resumed:
            print(f"  {self.resumed} pictures resumed from an interrupted run")
        if self.heads_outside:
            print(f"  {self.heads_outside} heads outside their pictures dropped")
        print_skipped(self.skipped, "samples")


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
    fingerprint = hashlib.sha256(settings.encode()).hexdigest()
    if destination.is_dir():
        raise CrowdExitError(f"{destination}: a folder, not a file to write to")
    try:
        done = _already_done(part, fingerprint)
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
            _read_back(file, report)
            if not report.pictures:
                file.close()
                part.unlink()
                first = ": ".join(report.skipped[0]) if report.skipped else "there is none"
                raise CrowdExitError(f"no sample could be prepared; {first}")
    except OSError as error:
        raise CrowdExitError(f"{destination}: cannot be written ({error.strerror or error})") from error
    report.skipped.sort()
    return report


def _already_done(part: Path, fingerprint: str) -> set[tuple[str, str]]:
    """(split, id) of the whole samples in an interrupted run's file; one of other settings is removed."""
    if not part.is_file():
        return set()
    try:
        with h5py.File(part, "r") as file:
            if file.attrs.get("prepared_with") == fingerprint:
                # The height is the last that is written of a sample.
                return {(s, id) for s, group in file.items() for id in group if "height" in group[id].attrs}
    except BlockingIOError as error:
        raise CrowdExitError(f"{part}: another run is writing it") from error
    except (OSError, RuntimeError, KeyError, ValueError):
        pass  # killed in the middle of a write: not readable, so started anew
    part.unlink()
    return set()


def _read_back(file: h5py.File, report: Report) -> None:
    for split, group in file.items():
        for sample in group.values():
            report.pictures[split] += 1
            report.heads[split] += sample.attrs["count"]
            report.heads_outside += int(sample.attrs.get("heads_outside", 0))
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to answer
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
    script = sys.modules["__main__"].__spec__
    context.set_forkserver_preload([script.name] if script else [])
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
        raise CrowdExitError("a worker process died, perhaps for want of memory; try fewer --jobs") from error
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
    """Run a script's command; see :func:`crowdexit.command.run`."""
    return command.run(app, arguments, interrupted="interrupted; the same command goes on where it was")


def read_picture(path: Path) -> tuple[NDArray[np.uint8], Image.Image]:
    """The bytes of a picture file, (n,) uint8, and the picture, decoded whole and in RGB.

    Raises:
        CrowdExitError: if it is missing, damaged, cut short or not a picture.
    """
    if not path.is_file():
        raise CrowdExitError(f"no picture {path.name}")
    data = path.read_bytes()
    try:
        with Image.open(BytesIO(data)) as picture:
            return np.frombuffer(data, np.uint8), picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise CrowdExitError(f"the picture {path.name} is damaged or no picture") from error


def resized(
    picture: Image.Image,
    points: NDArray[np.float32],
    width: int,
    height: int,
    canvas: tuple[int, int] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The picture at another size as JPEG bytes, (n,) uint8, and its heads moved with it, (N, 2) float32.

    With ``canvas``, a width and height, it lies in the upper left of a black picture of that size.
    """
    size = np.array([width, height], np.float32)
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    if canvas:
        scaled = scaled.crop((0, 0, *canvas))
    buffer = BytesIO()
    scaled.save(buffer, "JPEG", quality=JPEG_QUALITY)
    # A head just inside must not come to lie on the border through rounding.
    moved = np.minimum(points * (size / picture.size).astype(np.float32), np.nextafter(size, np.float32(0)))
    return np.frombuffer(buffer.getvalue(), np.uint8), moved


def read_mat(path: Path, name: str) -> Any:
    """One variable of a MATLAB file (up to version 7; nothing is unpickled).

    Raises:
        CrowdExitError: if the file is missing or damaged, or has no such variable.
    """
    if not path.is_file():
        raise CrowdExitError(f"no file {path.name}")
    try:
        return loadmat(path, variable_names=[name])[name]
    except KeyError as error:
        raise CrowdExitError(f"{path.name} holds no matrix {name!r}") from error
    except NotImplementedError as error:
        raise CrowdExitError(f"{path.name} is a MATLAB 7.3 file; save it as version 7") from error
    except Exception as error:  # a damaged file can fail in the reader anywhere and anyhow
        raise CrowdExitError(f"{path.name} is damaged or no MATLAB file") from error
