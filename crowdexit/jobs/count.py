"""The job of ``crowdexit count``: sources → predictions → sinks."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from pathlib import Path
from typing import TextIO

from crowdexit.inference.counter import CrowdCounter
from crowdexit.jobs.checks import NOTHING_COUNTED, check_inputs, nameable
from crowdexit.jobs.messages import warn
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.predict import BudgetPredictor, Predictor, SourcePredictor
from crowdexit.jobs.resume import ResumeState, open_rows
from crowdexit.jobs.rows import Rows, writer
from crowdexit.jobs.sinks import Drawings, ProgressSink, Report, RowSink, Sink
from crowdexit.jobs.sources import Kind, Source, SourceError, expand, is_single, skip_unreadable
from crowdexit.utils.progress import progress_bar
from crowdexit.video.frames import expected_rows


def count_inputs(
    counter: CrowdCounter,
    inputs: Sequence[str | Path],
    options: CountOptions | None = None,
    *,
    progress: bool = True,
) -> int:
    """Count images, folders, videos or a live source, and write a row for each image and each counted frame.

    An image ``x.jpg`` is counted with the audio ``x.wav`` next to it, a video with its own. A file of a folder that
    cannot be counted is reported on standard error and skipped; one that is named itself is an error.

    Args:
        progress: show a bar on standard error, if that is a terminal and the rows go elsewhere.

    Returns:
        The number of rows.

    Raises:
        CrowdExitError: for unusable inputs or options.
        KeyboardInterrupt: after Ctrl-C; SystemExit with 143: after SIGTERM. Outputs of a live source are complete.
    """
    sources = nameable(expand(inputs))
    options = (options or CountOptions()).for_sources(sources)
    named = check_inputs(sources, options)
    drawings = Drawings(options, sources, counter, named)
    with ExitStack() as stack:
        file, state = stack.enter_context(open_rows(counter, sources, options))
        shown = progress and sys.stderr.isatty() and not file.isatty()
        advance = stack.enter_context(_bar(sources, options, state)) if shown else _nowhere
        if options.deadline_ms is not None:
            _warm_up(counter, options.exit, options.deadline_ms)
        rows, report = RowSink(_writer(sources, options, state, file)), Report(options)
        sinks: Sequence[Sink] = (rows, report, drawings, ProgressSink(advance))
        predictor: Predictor = SourcePredictor(counter, options, report.reader_warning)
        if options.budget_ms is not None:
            predictor = BudgetPredictor(counter, options, sources)

        for source, at in state.remaining(sources):
            with skip_unreadable(source):
                _count(predictor, source, at, sinks)

        report.summarize(rows.written)
        total = state.rows + rows.written
        if total == 0:
            raise _ended_by(predictor.interrupted) if predictor.interrupted else SourceError(NOTHING_COUNTED)
    if predictor.interrupted:
        raise _ended_by(predictor.interrupted)
    return total


def _count(predictor: Predictor, source: Source, state: ResumeState, sinks: Sequence[Sink]) -> None:
    """Count a source from its resume point; each prediction goes to every sink at once."""
    with ExitStack() as stack:
        writes = [stack.enter_context(sink.open(source, state)) for sink in sinks]
        for prediction in stack.enter_context(closing(predictor.predict(source, state))):
            for write in writes:
                write(prediction)


def _writer(sources: Sequence[Source], options: CountOptions, state: ResumeState, file: TextIO) -> Rows:
    one_image = is_single(sources) and sources[0].kind == "image"
    names = [source.name for source in sources]
    return writer(options.format, file, names, single=one_image, begun=state.rows > 0)


def _bar(
    sources: Sequence[Source], options: CountOptions, state: ResumeState
) -> AbstractContextManager[Callable[[str], None]]:
    rows_of: dict[Kind, Callable[[Source], int]] = {
        "image": lambda source: 1,
        "video": lambda source: expected_rows(source.path, options.span),
        "live": lambda source: 0,
    }
    return progress_bar("counting", sum(rows_of[source.kind](source) for source in sources), done=state.rows)


def _nowhere(word: str) -> None:
    """Show nothing, without a progress bar."""


def _warm_up(counter: CrowdCounter, exit: str, deadline_ms: float) -> None:
    """Warm up before the first deadline, and warn if it is shorter than the first exit takes."""
    counter.warm_up(exit)
    first, takes = counter.first_answer(exit)
    if takes > deadline_ms:
        width, height = counter.size
        warn(
            f"no exit is as fast as {deadline_ms:g} ms here: the first, {first}, takes about {takes:.0f} ms for an "
            f"image of {width}×{height}"
        )


def _ended_by(number: int) -> BaseException:
    """The exception by which a signal ends a run after everything is written."""
    return KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
