"""Answers by a deadline: one thread computes, whoever asked waits no longer than he said.

At the deadline, or up to five milliseconds before it where the machine is too busy to wake anybody in time, the latest
answer is taken, even in the middle of a stage; what is running is broken off at the end of its layer, or with
torch.compile of its stage, and dropped. A request that comes meanwhile waits for that, and it counts to its own time. A
second thread would not help: two stages at once share the cores, and both come later. So there is one for the whole
process, whichever networks are asked: started by the first request, it ends with the process.
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

# A wait ends late where every core is busy, by up to two ticks of the scheduler: 8 ms at 250 a second.
_MOST_EARLY_S = 0.005
_STAYS = 0.9  # of what is known of that, from one wait to the next

T = TypeVar("T")
log = logging.getLogger(__name__)


class DeadlineMissed(CrowdExitError):
    """No exit had answered by the deadline."""


class _Request(Generic[T]):
    """Answers to come, step by step; ``came`` guards and tells of every change."""

    def __init__(self, steps: Iterator[T | None], deadline: float) -> None:
        self.steps, self.deadline = steps, deadline
        self.came = threading.Condition()
        self.answers: list[T] = []
        self.error: BaseException | None = None
        self.ended = False
        self.cancel_token = CancelToken()

    def advance(self) -> None:
        """Run a step; whatever goes wrong there belongs to whoever asked."""
        answer = None
        try:
            with self.cancel_token.working():
                answer = next(self.steps)
        except StopIteration:
            self._report(None, ended=True)
        except BaseException as problem:
            # Without this frame in its traceback: the error would hold the request that holds it, and the image.
            self.error = problem.with_traceback(problem.__traceback__ and problem.__traceback__.tb_next)
            self._report(None, ended=True)
        if answer is not None:
            self._report(answer)

    def wait(self, end: float, enough: Callable[[], object]) -> None:
        """Wait for that, or until then. Only for who holds ``came``."""
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
    """The thread, and what it is to do.

    Of several requests the one without an answer goes first, then the one whose deadline is next: every request
    comes to its first exit as early as can be, and a long one keeps nobody waiting for longer than a step.
    """

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget the thread: in a process that was forked off there is none."""
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
        """Wait for the running stage: a thread in one while the interpreter is taken down would bring it to a crash."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None


class _Waking:
    """By how much waits have ended late: the next one ends as much earlier, so that the answer is there in time."""

    def __init__(self) -> None:
        self.early_s = 0.0  # how much before the deadline to wake: next to nothing on a machine that has time

    def woke(self, late_s: float) -> None:
        """A wait has ended so late."""
        self.early_s = max(min(late_s, _MOST_EARLY_S), _STAYS * self.early_s)


_waking = _Waking()
_worker = _Worker()
atexit.register(_worker.end)
if hasattr(os, "register_at_fork"):
    # For requests to what is made after the fork. What ran a step when the process was forked is of no use there: that
    # step's locks are held by nobody who could let go of them.
    os.register_at_fork(after_in_child=_worker.begin_anew)


def answers_by(deadline: float, steps: Iterator[T | None], *, wait: bool) -> list[T]:
    """The answers that there are at a deadline, or all of them if that is earlier.

    Args:
        deadline: as of :func:`time.perf_counter`.
        steps: run in the thread; gives an answer or, after a step without one, None. What it raises after an answer
            is reported as a warning: the answers stand.
        wait: where there is none by then, wait for the first one.

    Raises:
        Whatever ``steps`` raises until then without having answered.
    """
    request = _Request(steps, deadline)
    _worker.take(request)
    try:
        with request.came:
            request.wait(deadline - _waking.early_s, lambda: request.ended)
            request.wait(deadline, lambda: request.ended or request.answers)  # the first one may still come
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
    """Run requests until None comes. Holds nothing of a request that is over, so that its counter can be freed."""
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
