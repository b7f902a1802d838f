"""Checks of the paths that users name, made before anything is loaded or computed."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # the installed package, with the samples beside its modules


def is_file(path: Path) -> bool:
    """Whether a path is a file; one that the system cannot even look up (too long a name, say) is none.

    Examples:
        >>> is_file(Path("x" * 300))
        False
    """
    try:
        return path.is_file()
    except OSError:
        return False


def output_file_problem(path: Path) -> str | None:
    """Why no file can be written to a path, or None.

    Raises:
        OSError: if the system refuses to look at it, e.g. because its name is too long.

    Examples:
        >>> output_file_problem(Path("."))
        'a folder; name a file to write'
    """
    if path.name in ("", "..") or path.is_dir():
        return "a folder; name a file to write"
    return _parent_problem(path)


def output_folder_problem(path: Path) -> str | None:
    """Why no folder can be made or used at a path, or None.

    Raises:
        OSError: if the system refuses to look at it.

    Examples:
        >>> output_folder_problem(Path(".")) is None
        True
    """
    if path.exists() and not path.is_dir():
        return "a file; name a folder to write to"
    return _parent_problem(path)


def _parent_problem(path: Path) -> str | None:
    """Why a path cannot be inside of the one above it; folders that are not there yet are made."""
    above = next((parent for parent in path.parents if parent.exists()), None)
    return None if above is None or above.is_dir() else f"{above} is a file, not a folder"
