"""What an analysis leaves behind: tables and figures, several files in a folder, each whole."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from crowdexit.errors import CrowdExitError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_files(folder: Path, contents: Mapping[str, str | Callable[[Path], None]]) -> list[Path]:
    """Write files by name, each beside and then renamed.

    Args:
        contents: a text, or what writes the file at a path.

    Raises:
        CrowdExitError: if the folder cannot be written.
    """
    paths = [folder / name for name in contents]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in paths:
            part = path.with_name(f"part-{os.getpid()}-{path.name}")
            content = contents[path.name]
            if isinstance(content, str):
                part.write_text(content, "utf-8")
            else:
                content(part)
            part.replace(path)
    except OSError as error:
        raise CrowdExitError(f"{folder}: cannot be written ({error.strerror})") from None
    return paths


def csv_text(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table in Markdown."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---|" * (len(header) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def blank(width: float, height: float) -> Figure:
    """An empty figure, sides in inches."""
    from matplotlib.figure import Figure  # slow to import, and only figures want it

    return Figure(figsize=(width, height), layout="constrained", dpi=120)
