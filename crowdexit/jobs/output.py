"""Output files: renamed into place when complete, and written by one run at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from crowdexit.errors import CrowdExitError
from crowdexit.utils.files import write_problem

if sys.platform != "win32":
    import fcntl


class OutputError(CrowdExitError):
    """Results that cannot be written."""


def part_of(out: Path) -> Path:
    """The temporary file of the rows until the run succeeds."""
    return out.with_name(out.name + ".part")


def output_paths(path: Path) -> set[Path]:
    """All files written for an output of that name, including itself; resolved."""
    part = part_of(path).name
    names = (path.name, part, f"{part}.json", f"{part}.json.part", f"{path.name}.new")
    return {path.with_name(name).resolve() for name in names}


@contextmanager
def exclusive_lock(out: Path) -> Iterator[None]:
    """Lock ``out`` against other runs, if the file system supports it.

    Raises:
        OutputError: if it is locked or cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    part = part_of(out)
    try:
        file = part.open("ab")
    except OSError as error:
        raise OutputError(write_problem(out, error)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{out}: another run is writing to it") from None
        except OSError:  # a file system without locks
            pass
        try:
            yield
        finally:
            if part.is_file() and part.stat().st_size == 0:
                part.unlink()


@contextmanager
def opened(
    out: Path | None, *, going_on: bool = False, finish: Callable[[Path, Path], object] = Path.replace
) -> Iterator[TextIO]:
    """Open a file for rows: standard output, or one that is renamed to ``out`` on success.

    After a failure the rows so far are in :func:`part_of` it, if there are any.

    Args:
        going_on: append to the existing rows.
        finish: converts that file to ``out``: (from, to).

    Raises:
        OutputError: if it cannot be written.
    """
    if out is None:
        with _standard_output() as file:
            yield file
        return
    part = part_of(out)
    if out.exists() and not out.is_file():
        raise OutputError(f"{out}: {'a folder' if out.is_dir() else 'a device or a pipe'}, not a file to write to")
    try:
        with part.open("a" if going_on else "w", encoding="utf-8", newline="") as file:
            yield file
        finish(part, out)
    except BaseException as error:
        kept = part.is_file() and part.stat().st_size > 0
        if part.is_file() and not kept:
            part.unlink()
        note = f" (the rows until then are in {part})" if kept else ""
        if isinstance(error, OSError):
            raise OutputError(f"{write_problem(out, error)}{note}") from None
        if isinstance(error, CrowdExitError):
            raise type(error)(f"{error}{note}") from error
        if kept:
            print(note.strip(" ()"), file=sys.stderr)
        raise


@contextmanager
def _standard_output() -> Iterator[TextIO]:
    """Standard output; if the reader closes it (``| head``), the run ends as by SIGPIPE."""
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):  # discards what is still buffered
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        raise OutputError(f"the standard output cannot be written ({error.strerror})") from None
