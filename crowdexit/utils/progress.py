"""The progress bar of every command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Advance(Protocol):
    """Moves a progress bar on by one."""

    def __call__(self, word: str = "") -> None:
        """Show a word behind the bar from now on."""


@contextmanager
def progress_bar(what: str, total: int, *, done: int = 0, console: Console | None = None) -> Iterator[Advance]:
    """A bar with the time left, only on a terminal; yields what moves it on.

    Args:
        what: is going on, before the bar. total: 0 where it is not known.
        console: default: the standard error.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    timing = (TimeElapsedColumn(), TimeRemainingColumn())
    hidden = not console.is_terminal
    # Results have their own way to the standard output, which may be a pipe.
    bar = Progress(*columns, *timing, console=console, redirect_stdout=False, transient=True, disable=hidden)
    with bar:
        task = bar.add_task("", total=total or None, completed=done)

        def advance(word: str = "") -> None:
            bar.update(task, advance=1, description=word)

        yield advance
