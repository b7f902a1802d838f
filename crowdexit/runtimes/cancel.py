"""Cancel the computation of another thread between two layers, not only between two stages.

A runtime either registers how to interrupt it (:func:`cancelled_by`) or polls (:func:`check`); one that does neither
runs to the end of its stage. Independent of PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_here = threading.local()  # .work: the token of this thread, if any


class Cancelled(Exception):
    """The computation was cancelled."""


class CancelToken:
    """Lets another thread cancel (``token()``) the work of a thread (``with token.working():``).

    Attributes:
        off: whether it was cancelled.
    """

    def __init__(self) -> None:
        self.off = False
        self._lock = threading.Lock()  # never interrupt work that has ended, or another thread's
        self._break: Callable[[], None] | None = None

    def __call__(self) -> None:
        with self._lock:
            self.off = True
            if self._break is not None:
                self._break()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Mark this thread's computation as cancellable by this token."""
        _here.work = self
        try:
            yield
        finally:
            _here.work = None

    @contextmanager
    def _cancel_with(self, end: Callable[[], None]) -> Iterator[None]:
        with self._lock:
            self._check()
            self._break = end
        try:
            yield
        except Exception:
            self._check()  # it broke since it was to
            raise
        finally:
            with self._lock:
                self._break = None

    def _check(self) -> None:
        if self.off:
            raise Cancelled


def may_be_cancelled() -> bool:
    """Whether this thread's computation can be cancelled."""
    return _work() is not None


def check() -> None:
    """Raise if this thread's computation was cancelled.

    Raises:
        Cancelled
    """
    work = _work()
    if work is not None:
        work._check()


@contextmanager
def cancelled_by(end: Callable[[], None]) -> Iterator[None]:
    """Register ``end``, which another thread calls to make this computation raise an error soon.

    Raises:
        Cancelled: instead of that error, or at once if already cancelled.
    """
    work = _work()
    if work is None:
        yield
        return
    with work._cancel_with(end):
        yield


def _work() -> CancelToken | None:
    work: CancelToken | None = getattr(_here, "work", None)
    return work
