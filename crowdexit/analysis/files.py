"""What an analysis leaves behind: several files in a folder, each whole."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from crowdexit.errors import CrowdExitError


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
