"""Calling off what another thread computes: it ends between two layers, not only between two stages.

A runtime that can be broken off says how while it runs (:func:`cancelled_by`), or asks now and then (:func:`check`);
one that does neither runs to the end of its stage. Knows nothing of PyTorch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_here = threading.local()  # .work: what this thread works under, if anything


class Cancelled(Exception):
    """What was being computed is not wanted any more."""


class CancelToken:
    """Work of one thread (``with token.working():``) that another may cancel (``token()``), once for all.

    Attributes:
        off: whether it has been.
    """

    def __init__(self) -> None:
        self.off = False
        self._lock = threading.Lock()  # nothing is broken off that has just ended, or has been begun by another
        self._break: Callable[[], None] | None = None

    def __call__(self) -> None:
        with self._lock:
            self.off = True
            if self._break is not None:
                self._break()

    @contextmanager
    def working(self) -> Iterator[None]:
        """What this thread computes meanwhile is what may be called off."""
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
    """Whether what this thread computes may be."""
    return _work() is not None


def check() -> None:
    """Go on, unless it has been called off.

    Raises:
        Cancelled
    """
    work = _work()
    if work is not None:
        work._check()


@contextmanager
def cancelled_by(end: Callable[[], None]) -> Iterator[None]:
    """While this thread computes here, ``end``, called from another thread, makes it raise an error soon.

    Raises:
        Cancelled: in place of that error, or at once, if it has been called off.
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
