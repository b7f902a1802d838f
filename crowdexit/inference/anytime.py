"""Return results by a deadline: one thread computes, and callers wait no longer than their deadline.

At the deadline, or up to five milliseconds earlier if the machine is too busy to wake threads in time, the latest
result is returned, even in the middle of a stage. The running step is cancelled at the end of its layer (with
torch.compile, of its stage). A request that arrives meanwhile waits for that, which counts towards its own deadline. A
second thread would not help, as two stages would share the cores and both finish later. One thread serves all networks
of the process; the first request starts it.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from crowdexit.errors import CrowdExitError
from crowdexit.runtimes.cancel import CancelToken

# With all cores busy, a wait ends up to two scheduler ticks late: 8 ms at 250 Hz.
_MOST_EARLY_S = 0.005
_STAYS = 0.9  # decay of the observed delay, per wait

T = TypeVar("T")
log = logging.getLogger(__name__)


class DeadlineMissed(CrowdExitError):
    """No exit had a result by the deadline."""


class _Request(Generic[T]):
    """A request and its results so far; ``came`` guards and signals every change."""

    def __init__(self, steps: Iterator[T | None], deadline: float) -> None:
        self.steps, self.deadline = steps, deadline
        self.came = threading.Condition()
        self.answers: list[T] = []
        self.error: BaseException | None = None
        self.ended = False
        self.cancel_token = CancelToken()

    def advance(self) -> None:
        """Run a step; its errors are passed to the caller."""
        answer = None
        try:
            with self.cancel_token.working():
                answer = next(self.steps)
        except StopIteration:
            self._report(None, ended=True)
        except BaseException as problem:
            # Drop this frame from the traceback, to avoid a reference cycle that keeps the image alive.
            self.error = problem.with_traceback(problem.__traceback__ and problem.__traceback__.tb_next)
            self._report(None, ended=True)
        if answer is not None:
            self._report(answer)

    def wait(self, end: float, enough: Callable[[], object]) -> None:
        """Wait for a condition or until a time. The caller holds ``came``."""
        left = min(max(0.0, end - time.perf_counter()), threading.TIMEOUT_MAX)
        if not self.came.wait_for(enough, left) and left:
            _waking.woke(time.perf_counter() - end)

    def _report(self, answer: T | None, *, ended: bool = False) -> None:
        with self.came:
            if answer is not None:
                self.answers.append(answer)
            self.ended = ended
            self.came.notify()


class _Worker:
    """The thread and its queue.

    Requests without a result go first, then those with the next deadline: every request reaches its first exit as early
    as possible, and a long one delays others by at most one step.
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Reset, as a forked process has no thread."""
        self._queue: SimpleQueue[_Request[Any] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def take(self, request: _Request[Any]) -> None:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=_work, args=(self._queue,), name="counting", daemon=True)
                thread.start()
                self._thread = thread
        self._queue.put(request)

    def end(self) -> None:
        """Wait for the running stage: a thread inside one crashes the interpreter at shutdown."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None


class _Waking:
    """Tracks how late waits end, so that the next one ends that much earlier."""

    def __init__(self) -> None:
        self.early_s = 0.0  # how long before the deadline to wake; about zero on an idle machine

    def woke(self, late_s: float) -> None:
        """Record how late a wait ended."""
        self.early_s = max(min(late_s, _MOST_EARLY_S), _STAYS * self.early_s)


_waking = _Waking()
_worker = _Worker()
atexit.register(_worker.end)
if hasattr(os, "register_at_fork"):
    # For counters made after the fork. Those that were running a step at the fork are unusable there, as its locks stay
    # held.
    os.register_at_fork(after_in_child=_worker.begin_anew)


def answers_by(deadline: float, steps: Iterator[T | None], *, wait: bool) -> list[T]:
    """The results available at a deadline, or all of them if they finish earlier.

    Args:
        deadline: as of :func:`time.perf_counter`.
        steps: run in the thread; yields a result, or None after a step without one. An error after the first result
            is logged as a warning.
        wait: wait for the first result if there is none by then.

    Raises:
        Whatever ``steps`` raises before its first result.
    """
    request = _Request(steps, deadline)
    _worker.take(request)
    try:
        with request.came:
            request.wait(deadline - _waking.early_s, lambda: request.ended)
            request.wait(deadline, lambda: request.ended or request.answers)  # in time for the first one, if it comes
            if wait:
                request.came.wait_for(lambda: request.ended or request.answers)
            error, request.error = request.error, None
            if error is not None and not request.answers:
                raise error
            if error is not None:
                log.warning(
                    "keeping the latest result, as the next exit failed: %s: %s", type(error).__name__, str(error)
                )
            return list(request.answers)
    finally:
        request.cancel_token()
        error = None  # its traceback has this frame in it


def _work(queue: SimpleQueue[_Request[Any] | None]) -> None:
    """Run requests until None arrives. Keeps no reference to finished requests, so that their counters can be freed."""
    live: list[_Request[Any]] = []
    while True:
        while not live or not queue.empty():
            come = queue.get()
            if come is None:
                return
            live.append(come)
            del come
        live = [request for request in live if not request.cancel_token.off]
        if live:
            most_urgent = min(live, key=lambda request: (bool(request.answers), request.deadline))
            most_urgent.advance()
            if most_urgent.ended:
                live.remove(most_urgent)
            del most_urgent
