"""Read, prepare and count in parallel: one thread each, connected by short queues."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from crowdexit.data.image import DecodedImage, ImageError
from crowdexit.data.mel import AudioInput
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.preprocessing import AudioLike, ImageLike
from crowdexit.jobs.options import CountOptions
from crowdexit.results import CountResult
from crowdexit.video.container import VideoError
from crowdexit.video.frames import Frame

_PATIENCE_S = 5.0  # for a thread to end what it is at

T = TypeVar("T")


@runtime_checkable
class Stoppable(Protocol):
    """An iterator that may block for long."""

    def stop(self) -> None:
        """Stop iterating; called from another thread."""


class Threads:
    """Iterators that prefetch, each in its own thread; leaving the context ends them all."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Threads:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(_PATIENCE_S)

    def ahead(self, items: Iterable[T], depth: int) -> Iterator[T]:
        """The same items; up to ``depth`` are prefetched while one more is computed.

        Raises:
            BaseException: what ``items`` raises, after the items before it.
        """
        held: deque[T] = deque()
        ended = False
        fault: BaseException | None = None

        def run() -> None:
            nonlocal ended, fault
            try:
                for item in items:
                    with self._changed:
                        self._changed.wait_for(lambda: self._stopped or len(held) < depth)
                        if self._stopped:
                            break
                        held.append(item)
                        self._changed.notify_all()
            except BaseException as error:
                fault = error
            finally:
                close = getattr(items, "close", None)  # of a generator, in the thread that it runs in
                if close is not None:
                    close()
                with self._changed:
                    ended = True
                    self._changed.notify_all()

        def taken() -> Iterator[T]:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: held or ended or self._stopped)
                    if not held or self._stopped:
                        break
                    item = held.popleft()
                    self._changed.notify_all()
                yield item
            if fault is not None:
                raise fault

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        return taken()


class _Ready(NamedTuple):
    """Frames, and what counts them."""

    frames: Sequence[Frame]
    counting: Callable[[], list[CountResult]]


def count_frames(
    counter: CrowdCounter, frames: Iterable[Frame], name: str, options: CountOptions | None = None
) -> Generator[tuple[Frame, CountResult | None], None, None]:
    """Count frames in order; the next ones are read and prepared meanwhile.

    Yields None for a frame without a result in time, if that fails (:attr:`CountOptions.late`).

    Args:
        frames: with their audio; a generator is closed at the end. An iterator with ``stop`` is live: no frame is
            taken before it can be counted, as it would be outdated; it is stopped at the end.
        name: of the video, for messages.

    Raises:
        CrowdExitError: as reading and counting do.
    """
    options = options or CountOptions()
    if options.deadline_ms is not None:
        counter.make_ready_for(options.policy)  # before anything else keeps the machine busy
    with ExitStack() as stack:
        if isinstance(frames, Stoppable):
            stack.callback(frames.stop)
            ready = _prepared(counter, frames, options)
        else:
            threads = stack.enter_context(Threads())
            ready = threads.ahead(_prepared(counter, threads.ahead(frames, options.batch_size + 1), options), 1)
        try:
            for group, counting in ready:
                counted: Sequence[CountResult | None]
                try:
                    counted = counting()
                except DeadlineMissed:  # with a deadline each frame is a group of its own
                    counted = [None]
                yield from zip(group, counted, strict=True)
        except ImageError as error:  # too small: it knows no name
            raise VideoError(f"{name}: {error}") from None


def _prepared(counter: CrowdCounter, frames: Iterable[Frame], options: CountOptions) -> Iterator[_Ready]:
    """Groups of prepared frames."""
    group: list[tuple[Frame, DecodedImage, AudioInput]] = []

    def ready() -> _Ready:
        batch = counter.prepare([(image, audio) for _, image, audio in group])
        of_frames = [frame for frame, *_ in group]
        group.clear()
        return _Ready(of_frames, partial(counter.answers, batch, exit=options.exit, policy=options.policy))

    for frame in frames:
        size = counter.size_for(*frame.size)
        image, audio = DecodedImage(frame.scaled(size or frame.size), frame.warnings), frame.audio
        if size is not None and options.deadline_ms is None:
            group.append((frame, image, audio))
            if len(group) == options.batch_size:
                yield ready()
            continue
        if group:
            yield ready()
        # Tiled, or counted exit by exit until the deadline.
        yield _Ready([frame], partial(_one, counter, image, audio, options))
    if group:
        yield ready()


def count_one(counter: CrowdCounter, image: ImageLike, audio: AudioLike | None, options: CountOptions) -> CountResult:
    """Count an image with these options; see :meth:`CrowdCounter.count`."""
    by: dict[str, Any] = {"exit": options.exit, "deadline_ms": options.deadline_ms, "late": options.late}
    return counter.count(image, audio, **by, policy=options.policy)


def _one(counter: CrowdCounter, image: ImageLike, audio: AudioLike | None, options: CountOptions) -> list[CountResult]:
    return [count_one(counter, image, audio, options)]
