"""Resume an interrupted run from its rows and a note of its settings."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from crowdexit.errors import CrowdExitError, Option, OptionError
from crowdexit.inference.counter import CrowdCounter
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.output import exclusive_lock, opened, part_of
from crowdexit.jobs.rows import COLUMNS, Format, csv_text, write_parquet
from crowdexit.jobs.smooth import Smoother
from crowdexit.jobs.sources import Source
from crowdexit.runtimes import selection
from crowdexit.utils.files import atomic_write


class ResumeError(CrowdExitError):
    """A run that cannot be resumed, or has different settings."""


@dataclass
class ResumeState:
    """Where an interrupted run continues.

    Attributes:
        rows: total number written.
        source: index of the source of the last row; -1: none.
        frames: rows of that source.
        after: the index of the last frame of its last complete batch. Counting restarts after it, so that batches are
            the same as without the interruption.
        again: rows after that frame, which are counted again but not written.
        smoother: its state after the last row.
    """

    smoother: Smoother
    rows: int = 0
    source: int = -1
    frames: int = 0
    after: int = -1
    again: int = 0

    def remaining(self, sources: Sequence[Source]) -> Iterator[tuple[Source, ResumeState]]:
        """The unfinished sources, each with its resume point."""
        for number, source in enumerate(sources):
            if number == self.source and source.kind != "image":
                yield source, self
            elif number > self.source:
                yield source, ResumeState(Smoother(self.smoother.half_life))


def recipe(counter: CrowdCounter, sources: Sequence[Source], options: CountOptions) -> dict[str, Any]:
    """Everything the rows depend on, as plain data: network, runtime, files by name and size, options.

    With a deadline, rows also depend on the current speed of the machine, which is not compared.
    """
    network = counter.network.config
    familiarity = None if counter.familiarity is None else counter.familiarity.to_dict()
    made = {
        "model": [counter.chain.fingerprint(), str(network), counter.exits, counter.intervals.to_dict(), familiarity],
        "runtime": counter.chain.runtime,
        "columns": COLUMNS,
        "inputs": [[*_size_of(source.path), *_size_of(source.audio)] for source in sources],
        "audio": _size_of(options.audio),
        **options.of_rows(),
    }
    plain: dict[str, Any] = json.loads(json.dumps(made, default=str))
    return plain


def _size_of(path: Path | None) -> list[object]:
    return [] if path is None else [str(path), path.stat().st_size if path.is_file() else None]


def note_of(out: Path) -> Path:
    """The file in which a run that writes to ``out`` stores its settings until it has finished."""
    return out.with_name(part_of(out).name + ".json")


def was_stopped(out: Path) -> bool:
    """Whether there are rows of an interrupted run."""
    return part_of(out).is_file() and part_of(out).stat().st_size > 0


def noted_runtime(out: Path) -> str | None:
    """The runtime of an interrupted run, as ``auto`` may choose another now. None: not recorded."""
    try:
        name = json.loads(note_of(out.resolve()).read_text("utf-8"))["runtime"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return name if isinstance(name, str) and name in selection.names() else None


def load_resume_state(
    out: Path, wanted: Mapping[str, Any], format: Format, names: Sequence[str], batch: int
) -> ResumeState:
    """Find the resume point; an incomplete last line is truncated.

    Args:
        wanted: the settings of the new run.
        names: of the sources. batch: frames per batch.

    Raises:
        ResumeError: if the rows are of another run, or cannot be continued.
    """
    part = part_of(out)
    try:
        there = json.loads(note_of(out).read_text("utf-8"))
        other = sorted(key for key in {*there, *wanted} if there.get(key) != wanted.get(key))
    except (OSError, ValueError, TypeError, AttributeError):
        raise ResumeError(f"{part}: its settings are unknown; delete it to start again") from None
    if other:
        changed = [_describe(key, there.get(key)) for key in other]
        raise ResumeError(f"{part}: made with different {', '.join(changed)}; delete it to start again")
    if format == "csv":
        names = [csv_text(name) for name in names]
    half_life, end, last = float(wanted["smooth"]), 0, -1
    state, recent = ResumeState(Smoother(half_life)), deque[int](maxlen=batch + 1)
    try:
        for end, row in _rows(part, format):  # noqa: B007 - the last value is where the file is truncated
            if row is None:
                continue
            frame = row["frame"]
            if state.source < 0 or row["source"] != names[state.source] or frame is None or frame <= last:
                state.source = names.index(row["source"], state.source + 1)
                state.frames, last, state.smoother = 0, -1, Smoother(half_life)
                recent.clear()
            if frame is not None:
                state.smoother.add(row["time_s"], row["count"])
                state.frames += 1
                recent.append(frame)
                last = frame
            state.rows += 1
    except (ValueError, KeyError, TypeError, csv.Error):
        raise ResumeError(f"{part}: its rows are not of these inputs; delete it to start again") from None
    os.truncate(part, end)
    state.again = state.frames % batch
    state.after = recent[-1 - state.again] if state.frames > state.again else -1
    return state


def _describe(key: str, value: object) -> str:
    """An option with its value in the interrupted run, if that is short."""
    return f"{key} ({value})" if isinstance(value, (str, int, float)) else key


def _rows(part: Path, format: Format) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(end offset, row) of every complete row; None for the header."""
    end, text = 0, b""
    with part.open("rb") as file:
        for line in file:
            text += line
            if not line.endswith(b"\n"):
                return
            if format == "csv" and text.count(b'"') % 2:  # a name with a line break in it
                continue
            row: dict[str, Any] | None
            if format == "csv":
                (cells,) = csv.reader(io.StringIO(text.decode("utf-8"), newline=""))
                row = None if end == 0 else dict(zip(COLUMNS, cells, strict=True))
                if row is None and tuple(cells) != COLUMNS:
                    raise ValueError
                if row is not None:
                    row |= {"frame": int(row["frame"]) if row["frame"] else None}
                    row |= {key: float(row[key]) if row[key] else None for key in ("time_s", "count")}
            else:
                row = {"frame": None, **json.loads(text)}
            end, text = end + len(text), b""
            yield end, row


@contextmanager
def open_rows(
    counter: CrowdCounter, sources: Sequence[Source], options: CountOptions
) -> Iterator[tuple[TextIO, ResumeState]]:
    """Open a file for rows and return the resume point; a resumed run appends to its rows.

    The file is renamed into place on success; until then it is locked, and a note next to it holds the settings.

    Raises:
        OptionError: if there is an interrupted run and it is not to be resumed, or has finished. ResumeError: if it
            cannot be resumed. OutputError: if it cannot be written.
    """
    out, state = options.out, ResumeState(Smoother(options.smooth))
    if out is None:
        with opened(None) as file:
            yield file, state
        return
    if options.resume and out.exists() and not was_stopped(out):
        raise OptionError("{}: a run has ended in {}; delete it to count again", Option("resume"), out)
    finish = write_parquet if options.format == "parquet" else Path.replace
    with exclusive_lock(out):
        if not options.resume and was_stopped(out):
            raise _stopped_before(out)
        if not options.resumable or sources[0].kind == "live":
            with opened(out, finish=finish) as file:
                yield file, state
            return
        wanted = recipe(counter, sources, options)
        if options.resume and was_stopped(out):
            names = [source.name for source in sources]
            state = load_resume_state(out, wanted, options.format, names, options.batch_size)
        with _resumable(out, wanted, going_on=state.rows > 0, finish=finish) as file:
            yield file, state


def _stopped_before(out: Path) -> OptionError:
    """The error for an existing interrupted run, with what to do."""
    if note_of(out).is_file():
        text = "{}: an interrupted run; resume it with {}, or delete {}"
        return OptionError(text, out, Option("resume"), part_of(out))
    return OptionError("{}: an interrupted run; rename or delete its rows, {}", out, part_of(out))


@contextmanager
def _resumable(
    out: Path, wanted: Mapping[str, Any], *, going_on: bool, finish: Callable[[Path, Path], object] = Path.replace
) -> Iterator[TextIO]:
    """As :func:`crowdexit.jobs.output.opened`, with a note of the settings until the run has finished."""
    note = note_of(out)
    try:
        with opened(out, going_on=going_on, finish=finish) as file:
            if not going_on:  # else it exists, and a full disk must not remove it
                with atomic_write(note) as new:
                    new.write_text(json.dumps(wanted), "utf-8")
            yield file
    finally:
        if not part_of(out).exists():
            note.unlink(missing_ok=True)
