"""A lock that is fair: whoever came first goes first."""

from __future__ import annotations

import threading
from collections import deque


class FairLock:
    """As a context, held by one thread at a time, in the order in which they came.

    A plain lock goes to whoever snatches it: a thread that lets go of it and wants it again at once would have it over
    and over, and another would wait for as long as that goes on.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._line: deque[threading.Lock] = deque()  # one for each thread, open from when it is the first

    def __enter__(self) -> None:
        mine = threading.Lock()
        with self._guard:
            self._line.append(mine)
            if len(self._line) > 1:
                mine.acquire()
        try:
            mine.acquire()
        except BaseException:  # Ctrl-C
            self._leave(mine)
            raise

    def __exit__(self, *_: object) -> None:
        self._leave(self._line[0])

    def _leave(self, mine: threading.Lock) -> None:
        with self._guard:
            first = self._line[0] is mine
            self._line.remove(mine)
            if first and self._line:
                self._line[0].release()
