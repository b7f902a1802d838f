"""Answers by a deadline: one thread computes, whoever asked waits no longer than he said.

At the deadline the latest answer is taken, even in the middle of a stage; what is running ends with its stage and is
then dropped. A stage cannot be broken off: a request that comes meanwhile waits for it, and that counts to its own
time. A second thread would not help: two stages at once share the cores, and both come later.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar, cast

from crowdexit.errors import CrowdExitError

T = TypeVar("T")


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
        self.called_off = False

    def advance(self) -> None:
        """Run a step; whatever goes wrong there belongs to whoever asked."""
        answer, error, ended = None, None, False
        try:
            answer = next(self.steps)
        except StopIteration:
            ended = True
        except BaseException as problem:
            error, ended = problem, True
        if answer is None and not ended:
            return
        with self.came:
            if answer is not None:
                self.answers.append(answer)
            self.error, self.ended = error, ended
            self.came.notify()


_Queue: TypeAlias = "SimpleQueue[_Request[object] | None]"
_running: weakref.WeakKeyDictionary[threading.Thread, _Queue] = weakref.WeakKeyDictionary()


class Worker:
    """One thread that runs requests step by step, started by the first of them; it ends with this object.

    Of several requests the one without an answer goes first, then the one whose deadline is next: every request
    comes to its first exit as early as can be, and a long one keeps nobody waiting for longer than a step.
    """

    def __init__(self) -> None:
        self._queue: _Queue = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def answers_by(self, deadline: float, steps: Iterator[T | None], *, wait: bool) -> list[T]:
        """The answers that there are at a deadline, or all of them if that is earlier.

        Args:
            deadline: as of :func:`time.perf_counter`.
            steps: run in the thread; gives an answer or, after a step without one, None.
            wait: where there is none by then, wait for the first one.

        Raises:
            Whatever ``steps`` raises until then.
        """
        request = _Request(steps, deadline)
        self._start()
        self._queue.put(cast(_Request[object], request))
        try:
            with request.came:
                left = min(max(0.0, deadline - time.perf_counter()), threading.TIMEOUT_MAX)
                request.came.wait_for(lambda: request.ended, left)
                if wait:
                    request.came.wait_for(lambda: request.ended or request.answers)
                if request.error is not None:
                    raise request.error
                return list(request.answers)
        finally:
            request.called_off = True

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None and self._thread.is_alive():  # not so in a process that was forked off
                return
            self._queue = SimpleQueue()
            self._thread = threading.Thread(target=_work, args=(self._queue,), name="counting", daemon=True)
            self._thread.start()
            _running[self._thread] = self._queue
            weakref.finalize(self, self._queue.put, None)


def _work(queue: _Queue) -> None:
    """Run requests until None comes. Holds nothing of a request that is over, so that its counter can be freed."""
    live: list[_Request[object]] = []
    while True:
        while not live or not queue.empty():
            come = queue.get()
            if come is None:
                return
            live.append(come)
            del come
        live = [request for request in live if not request.called_off]
        if live:
            most_urgent = min(live, key=lambda request: (bool(request.answers), request.deadline))
            most_urgent.advance()
            if most_urgent.ended:
                live.remove(most_urgent)
            del most_urgent


@atexit.register
def _end_all() -> None:
    """Wait for running stages: a thread still in one when the interpreter is taken down would bring it to a crash."""
    for thread, queue in list(_running.items()):
        queue.put(None)
        thread.join()
