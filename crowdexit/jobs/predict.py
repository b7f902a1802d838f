"""Predict counts of sources: one for an image, one for each counted frame of a video or live source."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Protocol

from crowdexit.data.image import DecodedImage, ImageError, read_image
from crowdexit.data.mel import AudioError, AudioInput
from crowdexit.data.views import tile_boxes
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.preprocessing import AudioLike, audio_input
from crowdexit.jobs.messages import say, warn
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.pipeline import count_frames, count_one
from crowdexit.jobs.resume import ResumeState
from crowdexit.jobs.sources import Source
from crowdexit.results import CountResult
from crowdexit.video.frames import Frame, read_frames
from crowdexit.video.live import LiveFrames


@dataclass(frozen=True)
class Prediction:
    """The count of an image, or of a frame of a video or a live source.

    Attributes:
        note: short status for the progress bar.
    """

    source: Source
    result: CountResult
    frame: Frame | None = None
    note: str = ""


class Predictor(Protocol):
    """Counts sources, one after the other.

    Attributes:
        interrupted: the signal that ended a live source; 0: none.
    """

    interrupted: int

    def predict(self, source: Source, state: ResumeState) -> Generator[Prediction, None, None]:
        """The predictions of a source, from its resume point."""
        ...


class SourcePredictor:
    """Counts images one by one, and frames in batches while the next ones are read.

    Args:
        reader_warning: called with each warning of a video's reader.
    """

    def __init__(self, counter: CrowdCounter, options: CountOptions, reader_warning: Callable[[str], None]) -> None:
        self.interrupted = 0
        self._counter, self._options, self._reader_warning = counter, options, reader_warning

    def predict(self, source: Source, state: ResumeState) -> Generator[Prediction, None, None]:
        """See :class:`Predictor`.

        Raises:
            CrowdExitError: as reading and counting do; DeadlineMissed also if no frame had a result in time.
        """
        if source.kind == "image":
            yield Prediction(source, self._image(source))
        elif source.kind == "video":
            span = replace(self._options.span, after=state.after)
            frames = read_frames(source.path, span, audio=self._options.audio, warn=self._reader_warning)
            yield from self._frames(source, frames, state)
        else:
            yield from self._live(source, state)

    def _image(self, source: Source) -> CountResult:
        try:
            return self._count(source, self._options.audio or source.audio)
        except AudioError as error:
            if self._options.audio is not None:
                raise
            return self._count(source, _unreadable(error))

    def _count(self, source: Source, audio: AudioLike | None) -> CountResult:
        try:
            return count_one(self._counter, source.path, audio, self._options)
        except DeadlineMissed as error:
            raise DeadlineMissed(f"{source.path}: {error}") from None

    def _frames(self, source: Source, frames: Iterable[Frame], state: ResumeState) -> Generator[Prediction, None, None]:
        answered, missed = state.frames, 0
        within = f"no exit answered within {self._options.deadline_ms or 0:g} ms"
        with closing(count_frames(self._counter, frames, source.name, self._options)) as counted:
            for frame, result in islice(counted, state.again, None):
                if result is not None:
                    answered += 1
                    yield Prediction(source, result, frame)
                    continue
                missed += 1
                if missed == 1:
                    warn(f"{source.name} at {frame.time_s:.1f} s: {within}; such frames have no row")
        if missed and not answered and not self.interrupted:
            raise DeadlineMissed(f"{source.name}: {within}, in any of {missed} frames")
        if missed > 1:
            warn(f"{source.name}: {missed} of {answered - state.frames + missed} frames have no row: {within}")

    def _live(self, source: Source, state: ResumeState) -> Generator[Prediction, None, None]:
        assert source.address is not None
        frames, answered = LiveFrames(source.address, self._options.span, warn), 0

        def interrupt(number: int, _: object) -> None:
            self.interrupted = number
            frames.stop()

        with _on_interrupt(interrupt):
            for prediction in self._frames(source, frames, state):
                answered += 1
                yield replace(prediction, note=f"{frames.dropped} dropped")
        say(f"{source.name}: {answered} frames counted, {frames.dropped} dropped")


class BudgetPredictor:
    """Counts all images within one time budget."""

    def __init__(self, counter: CrowdCounter, options: CountOptions, sources: Sequence[Source]) -> None:
        self.interrupted = 0
        self._counter, self._options, self._sources = counter, options, sources
        self._errors: deque[ImageError | AudioError] = deque()  # of images without a result
        self._left, self._results = len(sources), self._count()

    def predict(self, source: Source, state: ResumeState) -> Generator[Prediction, None, None]:
        """See :class:`Predictor`; the sources have to come in their order.

        Raises:
            CrowdExitError: as reading and :meth:`CrowdCounter.count_many` do.
        """
        result = next(self._results)
        self._left -= 1
        if result is not None:
            yield Prediction(source, result)
        if not self._left:
            deque(self._results, maxlen=0)  # the counter reports how the budget was used
        if result is None:
            raise self._errors.popleft()

    def _count(self) -> Iterator[CountResult | None]:
        samples = map(self._sample, self._sources)
        yield from self._counter.count_many(samples, budget_ms=self._options.budget_ms, number=len(self._sources))

    def _sample(self, source: Source) -> tuple[DecodedImage, AudioInput] | None:
        """An image with its audio; None if it cannot be counted."""
        try:
            fits = partial(tile_boxes, native=self._counter.size)
            image, audio = read_image(source.path, fits), audio_input(self._options.audio)
        except (ImageError, AudioError) as error:
            self._errors.append(error)
            return None
        if self._options.audio is None:
            try:
                audio = audio_input(source.audio)
            except AudioError as error:
                audio = _unreadable(error)
        return image, audio


def _unreadable(error: AudioError) -> AudioInput:
    """A placeholder for unreadable audio that the user did not name."""
    return AudioInput(None, "unreadable", (f"{error}; counted without it",))


@contextmanager
def _on_interrupt(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Call a function at the first Ctrl-C or SIGTERM instead of raising; main thread only."""
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
