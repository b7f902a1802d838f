"""How every command of the project ends: 0, or 2 with one line, or 130 after Ctrl-C and 143 after SIGTERM.

Rows that nobody reads any more (``| head``) end it with 141, as SIGPIPE would.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer

from crowdexit.errors import CrowdExitError
from crowdexit.utils.paths import output_file_problem, output_folder_problem
from crowdexit.utils.signals import INTERRUPTED, TERMINATED, hand_over

# typer shows the class of every misuse of a command line only as a parent of this one.
_Misuse: type[Exception] = typer.BadParameter.__mro__[1]


class Interrupted(Exception):
    """Ctrl-C in a command that has a line of its own for it."""


def run(app: typer.Typer, arguments: Sequence[str] | None = None, *, interrupted: str = INTERRUPTED) -> int:
    """Run a command line and return its exit code; what a user can mend becomes one line on stderr.

    Args:
        arguments: instead of the process's own.
        interrupted: the line to print after Ctrl-C.
    """
    try:
        with _tidy_end():
            code = int(typer.main.get_command(app)(arguments, standalone_mode=False) or 0)
    except CrowdExitError as error:
        return _refuse(str(error))
    except _Misuse as error:
        return _refuse(error.format_message())  # type: ignore[attr-defined]
    except OSError as error:  # a path that may not even be looked at, or is none (too long a name)
        if error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    except Interrupted as error:
        interrupted, code = str(error), 130
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print(interrupted, file=sys.stderr)
    return code


def output_file(path: Path | None) -> Path | None:
    """Callback of an option or argument that names a file to write: refuse what can be none.

    Raises:
        typer.BadParameter: for a folder, or below a file.
    """
    return _checked(path, output_file_problem)


def output_folder(path: Path | None) -> Path | None:
    """Callback of an option or argument that names a folder to write to: refuse what can be none.

    Raises:
        typer.BadParameter: for a file, or below one.
    """
    return _checked(path, output_folder_problem)


def _checked(path: Path | None, problem_of: Callable[[Path], str | None]) -> Path | None:
    problem = None if path is None else problem_of(path)
    if problem is not None:
        raise typer.BadParameter(f"{path}: {problem}")
    return path


@contextmanager
def _tidy_end() -> Iterator[None]:
    """SIGTERM raises SystemExit: what is half-written goes, and processes that were begun end too."""
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        print(TERMINATED, file=sys.stderr)
        raise SystemExit(128 + number)

    hand_over()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
