"""Sinks for predictions: rows, drawings, a report, a progress bar."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdexit.data.image import read_image
from crowdexit.data.mel import AudioStatus
from crowdexit.errors import Option, OptionError
from crowdexit.inference.counter import CrowdCounter
from crowdexit.jobs.messages import warn
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.output import OutputError, output_paths
from crowdexit.jobs.predict import Prediction
from crowdexit.jobs.resume import ResumeState
from crowdexit.jobs.rows import FrameRow, Rows
from crowdexit.jobs.sources import Source, is_single
from crowdexit.models.network import FINAL
from crowdexit.reports.draw import banner, overlay
from crowdexit.results import CountResult
from crowdexit.utils.files import atomic_write, write_problem
from crowdexit.video.annotate import AnnotatedVideo

Write = Callable[[Prediction], None]

# Why named audio was not used.
_NOT_USED: dict[AudioStatus, str] = {
    "none": "there is none at the time of the counted frames",
    "unreadable": "it cannot be read",
    "tiled": "the image is cut into tiles, and audio belongs to all of it",
    "switched off": "the exit used has no audio input",
}


class Sink(Protocol):
    """Consumes predictions, source by source."""

    def open(self, source: Source, state: ResumeState) -> AbstractContextManager[Write]:
        """A writer for the predictions of a source, from its resume point; after an error outputs stay incomplete."""
        ...


class RowSink:
    """Writes a row for each prediction, with a smoothed count for frames.

    Attributes:
        written: number of rows.
    """

    def __init__(self, rows: Rows) -> None:
        self.written = 0
        self._rows = rows

    @contextmanager
    def open(self, source: Source, state: ResumeState) -> Iterator[Write]:
        """See :class:`Sink`."""

        def write(prediction: Prediction) -> None:
            if prediction.frame is None:
                self._rows.image(source.name, prediction.result)
            else:
                self._rows.frame(FrameRow.of(source.name, prediction.frame, prediction.result, state.smoother))
            self.written += 1

        yield write


class Report:
    """Prints the warnings of readers and counts.

    Attributes:
        late: number of results after the deadline.
    """

    def __init__(self, options: CountOptions) -> None:
        self.late = 0
        self._options = options
        self._reported: set[str] = set()  # of the current source

    @contextmanager
    def open(self, source: Source, state: ResumeState) -> Iterator[Write]:
        """See :class:`Sink`; at the end reports why named audio was not used."""
        statuses: set[AudioStatus] = set()
        self._reported = set()

        def write(prediction: Prediction) -> None:
            statuses.add(prediction.result.audio)
            self.late += prediction.result.in_time is False
            for warning in prediction.result.warnings:
                self._warn(prediction, warning)

        yield write
        if self._options.audio is not None and "used" not in statuses:
            for status in sorted(statuses):
                warn(f"{self._options.audio}: not used, {_NOT_USED[status]}")

    def reader_warning(self, line: str) -> None:
        """Print a warning of the current source's reader, unless results repeat it."""
        self._reported.add(line)
        warn(line)

    def _warn(self, prediction: Prediction, warning: str) -> None:
        """Print a warning, once if many frames share it."""
        source, frame = prediction.source, prediction.frame
        if frame is None:
            warn(f"{source.path}: {warning}")
        elif warning not in self._reported and warning != frame.loss_warning:  # the reader summarises damage at the end
            warn(f"{source.name} at {frame.time_s:.1f} s: {warning}")
        self._reported.add(warning)

    def summarize(self, rows: int) -> None:
        """Print how many rows missed the deadline."""
        if self.late:
            marked = f" ({self.late} of {rows} rows)" if rows > 1 else ""
            warn(f"answered after the deadline of {self._options.deadline_ms:g} ms{marked}")


class Drawings:
    """Draws density over images, and density and count into videos, as requested.

    Args:
        taken: files that must not be overwritten, resolved.

    Raises:
        OptionError: if the exit has no density map, or a folder cannot be created.
    """

    def __init__(
        self, options: CountOptions, sources: Sequence[Source], counter: CrowdCounter, taken: set[Path]
    ) -> None:
        self._options, self._single, self._taken = options, is_single(sources), set(taken)
        if options.density is not None:
            if not counter.network.exit_module(FINAL).has_density:
                raise OptionError("{}: {} makes no map, it counts directly", Option("density"), counter.model)
            if options.exit not in (FINAL, "auto"):
                text = "{}: the exit {} makes no map, only the final one does"
                raise OptionError(text, Option("density"), options.exit)
        for option, path in (("density", options.density), ("annotate", options.annotate)):
            if path is not None and not self._single:
                try:
                    path.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise OptionError("{} {}: cannot be made ({})", Option(option), path, error.strerror) from None

    @contextmanager
    def open(self, source: Source, state: ResumeState) -> Iterator[Write]:
        """See :class:`Sink`."""
        path = self._options.density if source.kind == "image" else self._options.annotate or self._options.density
        if path is None:
            yield lambda prediction: None
        elif source.kind == "image":
            yield lambda prediction: self._draw_image(path, prediction)
        else:
            live = source.kind == "live"
            audio = None if live else self._options.audio or source.path
            target = self._target(path, source, ".mp4")
            with AnnotatedVideo(target, audio, 1 / self._options.fps, endless=live) as video:
                yield lambda prediction: _draw_frame(video, prediction)

    def _draw_image(self, path: Path, prediction: Prediction) -> None:
        source, density = prediction.source, _density_of(prediction.result)
        if density is None:
            warn(f"{source.path}: no density map, the answer is from before the final exit")
            return
        target = self._target(path, source, ".png")
        data = io.BytesIO()
        if target.suffix.lower() == ".npy":
            np.save(data, density.astype(np.float32))
        else:
            Image.fromarray(overlay(read_image(source.path).pixels, density)).save(data, "PNG")
        try:
            with atomic_write(target) as new:
                new.write_bytes(data.getvalue())
        except OSError as error:
            raise OutputError(write_problem(target, error)) from None

    def _target(self, path: Path, source: Source, suffix: str) -> Path:
        if self._single:
            return path
        target, number = path / (source.path.stem + suffix), 2
        while output_paths(target) & self._taken:  # x.jpg and x.png, or of two folders, or an input
            target, number = path / f"{source.path.stem}-{number}{suffix}", number + 1
        self._taken.add(target.resolve())
        return target


def _density_of(result: CountResult) -> NDArray[np.float32] | None:
    return next((e.density for e in result.exits if e.density is not None), None)


def _draw_frame(video: AnnotatedVideo, prediction: Prediction) -> None:
    """Add a frame with its count and, if available, its density."""
    frame, result = prediction.frame, prediction.result
    assert frame is not None
    density = _density_of(result)
    image = frame.image if density is None else overlay(frame.image, density)
    video.add(banner(image, f"{frame.time_s:.1f} s: {result.count:.0f} people ({result.chosen.exit})"), frame)


class ProgressSink:
    """Advances a progress bar with each prediction."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self._advance = advance

    @contextmanager
    def open(self, source: Source, state: ResumeState) -> Iterator[Write]:
        """See :class:`Sink`."""
        yield lambda prediction: self._advance(prediction.note)
