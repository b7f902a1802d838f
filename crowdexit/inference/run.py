"""From inputs to rows: what ``crowdexit count`` does once the model is loaded."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crowdexit.data.log_mel import AudioError
from crowdexit.data.picture import PictureError, read_picture
from crowdexit.errors import CrowdExitError
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.budget import TOLERANCE
from crowdexit.inference.counter import CountResult, CrowdCounter, Late
from crowdexit.inference.draw import banner, overlay
from crowdexit.inference.policies import ANYTIME
from crowdexit.inference.rows import Format, Rows, checked_format, opened, writer
from crowdexit.inference.scene import hear
from crowdexit.inference.sources import Source, expand
from crowdexit.inference.video import (
    DEFAULT_FPS,
    AnnotatedVideo,
    Frame,
    VideoError,
    checked_fps,
    count_video,
    expected_rows,
)
from crowdexit.inference.walk import Policy
from crowdexit.network import FINAL


class RunError(CrowdExitError):
    """Options that do not go together, or results that cannot be written."""


def count_inputs(
    counter: CrowdCounter,
    inputs: Sequence[str | Path],
    *,
    audio: Path | None = None,
    exit: str = "auto",
    deadline_ms: float | None = None,
    late: Late = "wait",
    policy: Policy = ANYTIME,
    budget_ms: float | None = None,
    fps: float | None = None,
    format: Format = "table",
    out: Path | None = None,
    density: Path | None = None,
    progress: bool = True,
) -> int:
    """Count pictures, folders and videos, and write a row for each picture and each counted frame.

    A picture ``x.jpg`` is heard with ``x.wav`` beside it, a video with its own sound. A file of a folder that
    cannot be counted is told on the standard error and passed over; one that is named itself is an error.

    Args:
        audio: the sound of a single picture, or in place of a single video's own.
        exit, deadline_ms, late, policy: of each of them, as of :meth:`CrowdCounter.count`.
        budget_ms: of all together, for pictures alone, as of :meth:`CrowdCounter.count_many`.
        fps: frames a second to count in videos; default: one.
        out: the file for the rows; default: the standard output.
        density: where to draw what was counted: of a single picture ``.png`` or ``.npy`` ((h, w) float32, heads
            a cell), of a single video ``.mp4`` with the counted frames; of several inputs a folder.
        progress: show a bar on the standard error, where that is a terminal and the rows go elsewhere.

    Returns:
        How many rows were written.

    Raises:
        CrowdExitError: for inputs or options that cannot be used.
    """
    sources = expand(inputs)
    single = len(sources) == 1 and sources[0].named
    checked_format(format)
    fps = DEFAULT_FPS if fps is None else checked_fps(fps)
    if audio is not None and not single:
        raise RunError(f"--audio {audio}: a sound belongs to one picture or video, not to several inputs")
    for option, path in (("--out", out), ("--density", density)):
        if path is not None and any(path.resolve() == s.path.resolve() for s in sources):
            raise RunError(f"{option} {path}: this is an input, it would be overwritten")
    if density is not None and not counter.network.exit_module(FINAL).maps:
        raise RunError(f"--density: {counter.model} makes no map, it counts directly")
    if budget_ms is not None:
        if any(source.kind != "picture" for source in sources):
            raise RunError("--budget-ms: pictures share a budget, a video has none")
        if exit != "auto" or deadline_ms is not None or policy is not ANYTIME or density is not None:
            raise RunError(
                "--budget-ms: a budget chooses the exits itself, without --exit, --deadline-ms, --policy or --density"
            )
    drawings = None if density is None else _Drawings(density, sources, single, exit)
    rows = 0
    with opened(out) as file, _bar(sources, fps, shown=progress and not file.isatty()) as advance:
        only_picture = single and sources[0].kind == "picture"
        lines = writer(format, file, [str(s.path) for s in sources], single=only_picture)
        job = _Job(counter, audio, exit, deadline_ms, late, policy, fps, lines, drawings)
        for _ in job.all_rows(sources) if budget_ms is None else job.rows_within(budget_ms, sources):
            rows += 1
            advance()
        if rows == 0:
            raise RunError("none of the files could be counted")
    return rows


@dataclass(frozen=True)
class _Job:
    """How each source is counted, and where that is written."""

    counter: CrowdCounter
    audio: Path | None
    exit: str
    deadline_ms: float | None
    late: Late
    policy: Policy
    fps: float
    lines: Rows
    drawings: _Drawings | None

    def all_rows(self, sources: Sequence[Source]) -> Iterator[None]:
        """Count sources one after the other, and yield after each row written."""
        for source in sources:
            try:
                yield from self._picture(source) if source.kind == "picture" else self._video(source)
            except (PictureError, VideoError, AudioError, DeadlineMissed) as error:
                _pass_over(source, error)

    def rows_within(self, budget_ms: float, sources: Sequence[Source]) -> Iterator[None]:
        """Count pictures within a time for all of them, and yield after each row written."""
        results = self.counter.count_many(map(self._sample, sources), budget_ms=budget_ms, number=len(sources))
        _ = self.counter.profile  # measured before the time begins
        begun = time.perf_counter()
        for source, result in zip(sources, results, strict=True):
            if result is not None:
                self.lines.picture(str(source.path), result)
                yield
        used = 1000 * (time.perf_counter() - begun)
        if used > (1 + TOLERANCE) * budget_ms:
            _tell(f"warning: it took {used:.0f} ms instead of {budget_ms:g}, the machine was slower than measured")

    def _picture(self, source: Source) -> Iterator[None]:
        try:
            result = self._count(source, self.audio or source.sound)
        except AudioError as error:
            if self.audio is not None:
                raise
            self._unheard(source, error)
            result = self._count(source, None)
        self.lines.picture(str(source.path), result)
        if self.drawings is not None:
            self.drawings.picture(source, read_picture(source.path), result)
        yield

    def _count(self, source: Source, sound: Path | None) -> CountResult:
        how: dict[str, Any] = {"exit": self.exit, "deadline_ms": self.deadline_ms}
        try:
            return self.counter.count(source.path, sound, **how, late=self.late, policy=self.policy)
        except DeadlineMissed as error:
            raise DeadlineMissed(f"{source.path}: {error}") from None

    def _sample(self, source: Source) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None] | None:
        """A picture with its sound; None of one that cannot be counted."""
        try:
            picture, sound = read_picture(source.path), hear(self.audio)
        except (PictureError, AudioError) as error:
            _pass_over(source, error)
            return None
        if sound is None:
            try:
                sound = hear(source.sound)
            except AudioError as error:
                self._unheard(source, error)
        return picture, sound

    def _unheard(self, source: Source, error: AudioError) -> None:
        """Say that a sound which nobody asked for cannot be heard."""
        _tell(f"warning: {error}; {source.path} is counted without it")

    def _video(self, source: Source) -> Iterator[None]:
        drawn = None if self.drawings is None else self.drawings.video(source, self.audio or source.path, 1 / self.fps)
        rows = count_video(
            self.counter,
            source.path,
            fps=self.fps,
            audio=self.audio,
            exit=self.exit,
            deadline_ms=self.deadline_ms,
            late=self.late,
            policy=self.policy,
            warn=lambda line: _tell(f"warning: {line}"),
            show=None if drawn is None else lambda frame, result: drawn.add(_annotated(frame, result), frame),
        )
        if drawn is None:
            for row in rows:
                self.lines.frame(row)
                yield
            return
        with drawn:
            for row in rows:
                self.lines.frame(row)
                yield


@dataclass
class _Drawings:
    """Where the pictures of what was counted go.

    Raises:
        RunError: if the path does not suit the sources, or the exit makes no map.
    """

    path: Path
    sources: Sequence[Source]
    single: bool
    exit: str
    _taken: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        suffix = self.path.suffix.lower()
        if self.exit not in (FINAL, "auto"):
            raise RunError(f"--density: the exit {self.exit} makes no map, only the final one does")
        if not self.single:
            if suffix in (".png", ".npy", ".mp4"):
                raise RunError(f"--density {self.path}: for several inputs this has to be a folder")
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"--density {self.path}: cannot be made ({error.strerror})") from None
            return
        suffixes = (".png", ".npy") if self.sources[0].kind == "picture" else (".mp4",)
        if suffix not in suffixes:
            raise RunError(f"--density {self.path}: of a {self.sources[0].kind} this ends in {' or '.join(suffixes)}")

    def picture(self, source: Source, picture: NDArray[np.uint8], result: CountResult) -> None:
        """Write a picture's density."""
        density = _density_of(result)
        if density is None:
            _tell(f"warning: {source.path}: no density map, the deadline came before the final exit")
            return
        target = self._target(source, ".png")
        data = io.BytesIO()
        if target.suffix.lower() == ".npy":
            np.save(data, density.astype(np.float32))
        else:
            Image.fromarray(overlay(picture, density)).save(data, "PNG")
        part = target.with_name(target.name + ".part")
        try:
            part.write_bytes(data.getvalue())
            part.replace(target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise RunError(f"{target}: cannot be written ({error.strerror})") from None

    def video(self, source: Source, sound: Path, usual: float) -> AnnotatedVideo:
        """A video to draw the counted frames into."""
        return AnnotatedVideo(self._target(source, ".mp4"), sound, usual)

    def _target(self, source: Source, suffix: str) -> Path:
        if self.single:
            return self.path
        target, number = self.path / (source.path.stem + suffix), 2
        while target in self._taken:  # x.jpg and x.png, or of two folders
            target, number = self.path / f"{source.path.stem}-{number}{suffix}", number + 1
        self._taken.add(target)
        return target


def _density_of(result: CountResult) -> NDArray[np.float32] | None:
    return next((e.density for e in result.exits if e.density is not None), None)


def _annotated(frame: Frame, result: CountResult) -> NDArray[np.uint8]:
    """A frame with its density, where there is one, and its count."""
    density = _density_of(result)
    picture = frame.picture if density is None else overlay(frame.picture, density)
    return banner(picture, f"{frame.time_s:.1f} s: {result.count:.0f} people ({result.chosen.exit})")


@contextmanager
def _bar(sources: Sequence[Source], fps: float, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar on the standard error; yields what moves it on by a row."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda: None
        return
    total = sum(1 if s.kind == "picture" else expected_rows(s.path, fps) for s in sources)
    columns = (TextColumn("counting"), BarColumn(), TextColumn("{task.completed:.0f}"), TimeElapsedColumn())
    # The rows have their own way to the standard output, which may be a pipe.
    with Progress(*columns, TimeRemainingColumn(), console=console, redirect_stdout=False, transient=True) as progress:
        task = progress.add_task("", total=total or None)
        yield lambda: progress.advance(task)


def _pass_over(source: Source, error: CrowdExitError) -> None:
    """Say that a file of a folder is not counted; one that is named itself is an error."""
    if source.named:
        raise error
    _tell(f"skipped: {error}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
