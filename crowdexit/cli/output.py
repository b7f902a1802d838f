"""What commands print beside their results: progress, and errors with the names of flags."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from crowdexit.errors import CrowdExitError, OptionError


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """Name settings by their flags in errors of the library."""
    try:
        yield
    except OptionError as error:
        raise CrowdExitError(error.with_names(lambda name: f"--{name.replace('_', '-')}")) from None


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar with the time left on stderr, only where that is a terminal; yields what moves it on by one."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
