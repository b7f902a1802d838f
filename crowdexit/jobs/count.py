"""From inputs to rows: what ``crowdexit count`` does once the model is loaded."""

from __future__ import annotations

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crowdexit.data.image import DecodedImage, ImageError, read_image
from crowdexit.data.mel import AudioError, AudioInput, AudioStatus
from crowdexit.data.views import tile_boxes
from crowdexit.errors import CrowdExitError, Option, OptionError
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.counter import CountResult, CrowdCounter
from crowdexit.inference.preprocessing import AudioLike, audio_input
from crowdexit.jobs.options import CountOptions, not_resumable
from crowdexit.jobs.pipeline import count_frames, count_one
from crowdexit.jobs.resume import ResumeState, load_resume_state, note_of, recipe, resumable, was_stopped
from crowdexit.jobs.rows import (
    FrameRow,
    Rows,
    exclusive_lock,
    opened,
    output_paths,
    part_of,
    write_parquet,
    writer,
)
from crowdexit.jobs.smooth import Smoother
from crowdexit.jobs.sources import Source, expand
from crowdexit.models.network import FINAL
from crowdexit.reports.draw import banner, overlay
from crowdexit.utils.files import atomic_write
from crowdexit.utils.paths import output_file_problem, output_folder_problem
from crowdexit.video.annotate import AnnotatedVideo
from crowdexit.video.container import VideoError
from crowdexit.video.decode import Span
from crowdexit.video.frames import Frame, expected_rows, read_frames
from crowdexit.video.live import LiveFrames

# Why audio that was named is not used.
_NOT_USED: dict[AudioStatus, str] = {
    "none": "there is none at the time of the counted frames",
    "unreadable": "it cannot be read",
    "tiled": "the image is cut into tiles, and audio belongs to all of it",
    "switched off": "the exit that answers takes none",
}


class RunError(CrowdExitError):
    """Nothing that could be counted, or results that cannot be written."""


def count_inputs(
    counter: CrowdCounter,
    inputs: Sequence[str | Path],
    options: CountOptions | None = None,
    *,
    progress: bool = True,
) -> int:
    """Count images, folders, videos or a live source, and write a row for each image and each counted frame.

    An image ``x.jpg`` is counted with the audio ``x.wav`` beside it, a video with its own. A file of a folder that
    cannot be counted is reported on the standard error and skipped; one that is named itself is an error.

    Args:
        progress: show a bar on the standard error, where that is a terminal and the rows go elsewhere.

    Returns:
        How many rows there are.

    Raises:
        CrowdExitError: for inputs or options that cannot be used.
        KeyboardInterrupt: after Ctrl-C; SystemExit with 143: after SIGTERM. Of a live source, all is written and whole.
    """
    options = options or CountOptions()
    sources = _printable(expand(inputs))
    if options.out is not None and options.out.is_symlink():
        options = replace(options, out=options.out.resolve())  # what it points to is written, not the link
    taken = check_inputs(sources, options)
    if sources[0].kind == "live" and options.batch is None:
        options = replace(options, batch=1)
    single = _is_single(sources)
    out, span = options.out, options.span
    leaves_note = options.resumable and sources[0].kind != "live"
    state = ResumeState(Smoother(options.smooth))
    drawings = _Drawings(options, sources, counter, taken)
    names = [s.name for s in sources]

    with ExitStack() as stack:
        finish = write_parquet if options.format == "parquet" else Path.replace
        if out is not None:
            if options.resume and out.exists() and not was_stopped(out):
                raise OptionError("{}: a run has ended in {}; delete it to count again", Option("resume"), out)
            stack.enter_context(exclusive_lock(out))
            if not options.resume and was_stopped(out):
                raise _stopped_before(out)
        if out is not None and leaves_note:
            wanted = recipe(counter, sources, options)
            if options.resume and was_stopped(out):
                state = load_resume_state(out, wanted, options.format, names, options.batch_size)
            file = stack.enter_context(resumable(out, wanted, going_on=state.rows > 0, finish=finish))
        else:
            file = stack.enter_context(opened(out, finish=finish))
        advance = stack.enter_context(_bar(sources, span, state.rows, shown=progress and not file.isatty()))
        if options.deadline_ms is not None:
            counter.warm_up(options.exit)
            _warn_if_too_short(counter, options.exit, options.deadline_ms)
        only_image = single and sources[0].kind == "image"
        lines = writer(options.format, file, names, single=only_image, begun=state.rows > 0)
        job = _Job(counter, options, lines, drawings, advance)
        rows = state.rows
        for _ in job.all_rows(sources, state) if options.budget_ms is None else job.rows_within_budget(sources):
            rows += 1
        job.warn_late(rows - state.rows)
        if rows == 0 and job.interrupted:
            raise _end_by(job.interrupted)
        if rows == 0:
            raise RunError("none of the files could be counted")
    if job.interrupted:
        raise _end_by(job.interrupted)
    return rows


def check_inputs(sources: Sequence[Source], options: CountOptions) -> set[Path]:
    """Refuse options that do not suit the sources, and paths that results cannot go to, before anything is loaded.

    Returns:
        All files that have been named, resolved: inputs and what will be written.

    Raises:
        OptionError: for an option that does not suit, or a path that is an input or cannot be written.
    """
    kinds = {s.kind for s in sources}
    single = _is_single(sources)
    if options.audio is not None and (not single or "live" in kinds):
        problem = "a sound belongs to one image or video, not to several or a live source"
        raise OptionError("{} {}: {}", Option("audio"), options.audio, problem)
    taken = _check_paths(sources, options)
    if "live" in kinds:
        if options.start:
            raise OptionError("{} {:g}: a live source begins now", Option("start"), options.start)
        if options.resume:
            raise not_resumable()
    if options.budget_ms is not None and kinds != {"image"}:
        raise OptionError("{}: images share a budget, a video has none", Option("budget_ms"))
    if options.resume and options.late == "fail" and len(set(sources)) < len(sources):
        problem = "it could not be told where a file that is named twice begins again"
        raise OptionError("{}: with {} fail {}", Option("resume"), Option("late"), problem)
    return taken


def _check_paths(sources: Sequence[Source], options: CountOptions) -> set[Path]:
    single = _is_single(sources)
    named: set[Path] = set()
    given = {path.resolve() for s in sources for path in (s.path, s.audio, options.audio) if path is not None}
    drawn = {Option("density"): options.density, Option("annotate"): options.annotate}
    for option, path in {Option("out"): options.out, **drawn}.items():
        if path is None:
            continue
        if path.resolve() in given:
            raise OptionError("{} {}: this is an input, it would be overwritten", option, path)
        is_one_file = single or option == "out"  # else a folder, in which nothing is overwritten
        problem = output_file_problem(path) if is_one_file else output_folder_problem(path)
        if problem is None and option == "out" and not path.parent.is_dir():
            problem = f"cannot be written, there is no folder {path.parent}"
        if problem is not None:
            raise OptionError("{} {}: {}", option, path, problem)
        written = output_paths(path) if is_one_file else set()
        if overwritten := written & (given | named):
            problem = f"{min(overwritten)} would be overwritten, choose another name"
            raise OptionError("{} {}: {}", option, path, problem)
        named |= written
    kinds = {s.kind for s in sources}
    density, annotate = drawn
    if options.annotate is not None and kinds == {"image"}:
        text = "{} {}: this is for videos; of images, {} shows the map"
        raise OptionError(text, annotate, options.annotate, density)
    if options.annotate is not None and options.density is not None and "image" not in kinds:
        raise OptionError("{} {}: of a video, {} draws it; name one of the two", density, options.density, annotate)
    for option, path in drawn.items():
        if path is None:
            continue
        suffix = path.suffix.lower()
        if not single:
            if suffix in (".png", ".npy", ".mp4"):
                raise OptionError("{} {}: for several inputs this has to be a folder", option, path)
            continue
        kind = sources[0].kind
        suffixes = (".png", ".npy") if kind == "image" else (".mp4",)
        if suffix not in suffixes:
            of = {"live": "a live source", "video": "a video", "image": "an image"}[kind]
            raise OptionError("{} {}: of {} this ends in {}", option, path, of, " or ".join(suffixes))
    return given | named


def _is_single(sources: Sequence[Source]) -> bool:
    """Whether the user has named one file or live source, and nothing else."""
    return len(sources) == 1 and sources[0].named


def _stopped_before(out: Path) -> OptionError:
    """That a run was stopped while it wrote there, and what can be done."""
    if note_of(out).is_file():
        text = "{}: a run was stopped there; {} goes on with it, or delete {}"
        return OptionError(text, out, Option("resume"), part_of(out))
    return OptionError("{}: a run was stopped there; rename or delete its rows, {}", out, part_of(out))


@dataclass
class _Job:
    """How each source is counted, and where that is written."""

    counter: CrowdCounter
    options: CountOptions
    lines: Rows
    drawings: _Drawings
    advance: Callable[[str], None]
    late: int = 0  # answers that came after the deadline
    interrupted: int = 0  # the signal that came while a live source was counted, which is how most of them end

    def all_rows(self, sources: Sequence[Source], state: ResumeState) -> Iterator[None]:
        """Count sources one after the other, from where a stopped run has left; yield after each row written."""
        for number, source in enumerate(sources):
            if number < state.source or (number == state.source and source.kind == "image"):
                continue
            at = state if number == state.source else ResumeState(Smoother(state.smoother.half_life))
            try:
                if source.kind == "image":
                    yield from self._image(source)
                else:
                    yield from self._live(source, at) if source.kind == "live" else self._video(source, at)
            except (ImageError, VideoError, AudioError, DeadlineMissed) as error:
                _pass_over(source, error)

    def rows_within_budget(self, sources: Sequence[Source]) -> Iterator[None]:
        """Count images within a time for all of them, and yield after each row written."""
        results = self.counter.count_many(
            map(self._sample, sources), budget_ms=self.options.budget_ms, number=len(sources)
        )
        for source, result in zip(sources, results, strict=True):
            if result is not None:
                self._write(source, result)
                yield

    def _image(self, source: Source) -> Iterator[None]:
        try:
            result = self._count(source, self.options.audio or source.audio)
        except AudioError as error:
            if self.options.audio is not None:
                raise
            result = self._count(source, _unreadable(error))
        self._write(source, result)
        self.drawings.image(source, result)
        yield

    def _write(self, source: Source, result: CountResult) -> None:
        """Write the row of an image, and tell its warnings."""
        self.late += result.in_time is False
        self.lines.image(source.name, result)
        for warning in result.warnings:
            _warn(f"{source.path}: {warning}")
        self._warn_of_unused_audio({result.audio})
        self.advance("")

    def warn_late(self, rows: int) -> None:
        """Say how many of the rows of this run were answered after the deadline."""
        if self.late:
            marked = f" ({self.late} of {rows} rows)" if rows > 1 else ""
            _warn(f"answered after the deadline of {self.options.deadline_ms:g} ms{marked}")

    def _warn_of_unused_audio(self, statuses: set[AudioStatus]) -> None:
        """Say that the audio which the user has named was not used, and why; ``statuses`` are those of the rows."""
        if self.options.audio is None or "used" in statuses:
            return
        for status in sorted(statuses):
            _warn(f"{self.options.audio}: not used, {_NOT_USED[status]}")

    def _count(self, source: Source, audio: AudioLike | None) -> CountResult:
        try:
            return count_one(self.counter, source.path, audio, self.options)
        except DeadlineMissed as error:
            raise DeadlineMissed(f"{source.path}: {error}") from None

    def _sample(self, source: Source) -> tuple[DecodedImage, AudioInput] | None:
        """An image with its audio; None of one that cannot be counted."""
        try:
            fits = partial(tile_boxes, native=self.counter.size)
            image, audio = read_image(source.path, fits), audio_input(self.options.audio)
        except (ImageError, AudioError) as error:
            _pass_over(source, error)
            return None
        if self.options.audio is None:
            try:
                audio = audio_input(source.audio)
            except AudioError as error:
                audio = _unreadable(error)
        return image, audio

    def _video(self, source: Source, state: ResumeState) -> Iterator[None]:
        span = replace(self.options.span, after=state.after)
        reported: set[str] = set()

        def warn(line: str) -> None:
            reported.add(line)
            _warn(line)

        frames = read_frames(source.path, span, audio=self.options.audio, warn=warn)
        for _ in self._frames(source, frames, state, reported, audio=self.options.audio or source.path):
            self.advance("")
            yield

    def _live(self, source: Source, state: ResumeState) -> Iterator[None]:
        assert source.address is not None
        frames, rows = LiveFrames(source.address, self.options.span, _warn), 0

        def interrupt(number: int, _: object) -> None:
            self.interrupted = number
            frames.stop()

        with _on_interrupt(interrupt):
            for _ in self._frames(source, frames, state, set(), audio=None):
                rows += 1
                self.advance(f"{frames.dropped} dropped")
                yield
        _print_line(f"{source.name}: {rows} frames counted, {frames.dropped} dropped")

    def _frames(
        self, source: Source, frames: Iterable[Frame], state: ResumeState, reported: set[str], *, audio: Path | None
    ) -> Iterator[None]:
        """Count frames; ``reported``: the reader's warnings that have been printed; rows may hold some too."""
        counted, rows, missed = count_frames(self.counter, frames, source.name, self.options), state.frames, 0
        within = f"no exit answered within {self.options.deadline_ms or 0:g} ms"
        statuses: set[AudioStatus] = set()
        with ExitStack() as stack:
            drawn = self.drawings.video(source, audio, 1 / self.options.span.fps)
            if drawn is not None:
                stack.enter_context(drawn)
            stack.callback(counted.close)
            for frame, result in islice(counted, state.again, None):
                if result is None:
                    missed += 1
                    if missed == 1:
                        _warn(f"{source.name} at {frame.time_s:.1f} s: {within}; such frames have no row")
                    continue
                rows += 1
                self.late += result.in_time is False
                self.lines.frame(FrameRow.of(source.name, frame, result, state.smoother))
                statuses.add(result.audio)
                for (
                    warning
                ) in result.warnings:  # each stands in the row of every frame that has it, but is reported once
                    # The reader sums damage up at the end.
                    if warning not in reported and warning != frame.loss_warning:
                        _warn(f"{source.name} at {frame.time_s:.1f} s: {warning}")
                    reported.add(warning)
                if drawn is not None:
                    drawn.add(_annotated(frame, result), frame)
                yield
            if statuses:
                self._warn_of_unused_audio(statuses)
            if missed and not rows and not self.interrupted:
                raise DeadlineMissed(f"{source.name}: {within}, in any of {missed} frames")
            if missed > 1:
                _warn(f"{source.name}: {missed} of {rows - state.frames + missed} frames have no row: {within}")


@dataclass
class _Drawings:
    """Where the images of what was counted go; :func:`check_inputs` has seen the paths.

    Raises:
        OptionError: if there is no map to draw, or a folder cannot be made.
    """

    options: CountOptions
    sources: Sequence[Source]
    counter: CrowdCounter
    taken: set[Path]  # what the user has named, and what has been drawn

    def __post_init__(self) -> None:
        if self.options.density is not None:
            if not self.counter.network.exit_module(FINAL).maps:
                raise OptionError("{}: {} makes no map, it counts directly", Option("density"), self.counter.model)
            if self.options.exit not in (FINAL, "auto"):
                text = "{}: the exit {} makes no map, only the final one does"
                raise OptionError(text, Option("density"), self.options.exit)
        for option, path in (("density", self.options.density), ("annotate", self.options.annotate)):
            if path is not None and not _is_single(self.sources):
                try:
                    path.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise OptionError("{} {}: cannot be made ({})", Option(option), path, error.strerror) from None

    def image(self, source: Source, result: CountResult) -> None:
        """Write an image's density, if that is wanted."""
        if self.options.density is None:
            return
        density = _density_of(result)
        if density is None:
            _print_line(f"warning: {source.path}: no density map, the answer is from before the final exit")
            return
        target = self._target(self.options.density, source, ".png")
        data = io.BytesIO()
        if target.suffix.lower() == ".npy":
            np.save(data, density.astype(np.float32))
        else:
            Image.fromarray(overlay(read_image(source.path).pixels, density)).save(data, "PNG")
        try:
            with atomic_write(target) as new:
                new.write_bytes(data.getvalue())
        except OSError as error:
            raise RunError(f"{target}: cannot be written ({error.strerror})") from None

    def video(self, source: Source, audio: Path | None, usual: float) -> AnnotatedVideo | None:
        """A video to draw the counted frames into, if that is wanted."""
        path = self.options.annotate or self.options.density
        if path is None:
            return None
        return AnnotatedVideo(self._target(path, source, ".mp4"), audio, usual, endless=source.kind == "live")

    def _target(self, path: Path, source: Source, suffix: str) -> Path:
        if _is_single(self.sources):
            return path
        target, number = path / (source.path.stem + suffix), 2
        while output_paths(target) & self.taken:  # x.jpg and x.png, or of two folders, or an input
            target, number = path / f"{source.path.stem}-{number}{suffix}", number + 1
        self.taken.add(target.resolve())
        return target


def _unreadable(error: AudioError) -> AudioInput:
    """In place of audio that nobody has named and that cannot be read."""
    return AudioInput(None, "unreadable", (f"{error}; counted without it",))


def _density_of(result: CountResult) -> NDArray[np.float32] | None:
    return next((e.density for e in result.exits if e.density is not None), None)


def _annotated(frame: Frame, result: CountResult) -> NDArray[np.uint8]:
    """A frame with its density, where there is one, and its count."""
    density = _density_of(result)
    image = frame.image if density is None else overlay(frame.image, density)
    return banner(image, f"{frame.time_s:.1f} s: {result.count:.0f} people ({result.chosen.exit})")


@contextmanager
def _on_interrupt(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call this at the first Ctrl-C or SIGTERM rather than be interrupted; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def restore() -> None:
        for number, former in before.items():
            signal.signal(number, former)

    def once(number: int, frame: object) -> None:
        restore()
        handler(number, frame)

    before = {number: signal.signal(number, once) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        restore()


def _end_by(number: int) -> BaseException:
    """How a signal ends a run that has written all it had."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)


@contextmanager
def _bar(sources: Sequence[Source], span: Span, done: int, *, shown: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on the standard error; yields what moves it on by a row, with a word behind it."""
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield lambda word: None
        return
    total = {"image": lambda s: 1, "video": lambda s: expected_rows(s.path, span), "live": lambda s: 0}
    rows = sum(total[s.kind](s) for s in sources)
    columns = (TextColumn("counting"), BarColumn(), TextColumn("{task.completed:.0f} {task.description}"))
    timing = (TimeElapsedColumn(), TimeRemainingColumn())
    # The rows have their own way to the standard output, which may be a pipe.
    with Progress(*columns, *timing, console=console, redirect_stdout=False, transient=True) as progress:
        task = progress.add_task("", total=rows or None, completed=done)
        yield lambda word: progress.update(task, advance=1, description=word)


def _warn(line: str) -> None:
    _print_line(f"warning: {line}")


def _printable(sources: Sequence[Source]) -> list[Source]:
    """Those whose names rows can hold, which is in UTF-8.

    Raises:
        RunError: if there is none, or one that was named itself has another name.
    """
    good = []
    for source in sources:
        try:
            source.name.encode()
            good.append(source)
        except UnicodeEncodeError:
            name = source.name.encode(errors="backslashreplace").decode()
            _pass_over(source, RunError(f"{name}: no row can hold this name, it is not in UTF-8"))
    if not good:
        raise RunError("none of the files could be counted")
    return good


def _warn_if_too_short(counter: CrowdCounter, exit: str, deadline_ms: float) -> None:
    """Say before the run that a deadline is shorter than any exit takes, where it is."""
    name, takes = counter.first_answer(exit)
    if takes > deadline_ms:
        width, height = counter.size
        _warn(
            f"no exit is as fast as {deadline_ms:g} ms here: the first, {name}, takes about {takes:.0f} ms for an "
            f"image of {width}×{height}"
        )


def _pass_over(source: Source, error: CrowdExitError) -> None:
    """Say that a file of a folder is not counted; one that is named itself is an error."""
    if source.named:
        raise error
    _print_line(f"skipped: {error}")


def _print_line(line: str) -> None:
    print(line, file=sys.stderr)
