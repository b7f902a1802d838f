"""Ctrl-C and SIGTERM while a program is still being imported: one line and the usual exit code, nothing else.

Imports take seconds, and nothing has been written by then. :func:`crowdexit.utils.command.run` takes over afterwards.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

INTERRUPTED, TERMINATED = "interrupted", "terminated"


def end_in_one_line() -> None:
    """From now on both signals end the process at once, with a line on the standard error and code 130 or 143.

    Only the main thread can change signals; elsewhere this does nothing.
    """
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)


def end_imports_in_one_line() -> None:
    """:func:`end_in_one_line`, where ``python -m`` is importing the package of the program that it will run.

    For a package's ``__init__``: whoever imports the package as a library keeps the signals as they are.
    """
    if sys.argv[:1] == ["-m"]:  # replaced by the program's path before it begins
        end_in_one_line()


def hand_over() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    line = INTERRUPTED if number == signal.SIGINT else TERMINATED
    os.write(2, f"{line}\n".encode())
    os._exit(128 + number)
