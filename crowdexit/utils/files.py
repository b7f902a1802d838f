"""Writing files: whole or not at all, and a clear line where the disk is full."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)


class DiskFullError(OSError):
    """A write that has no room on its disk.

    Attributes:
        needed: how many bytes it needs, or None where that is not known.
    """

    def __init__(self, path: Path | str, needed: int | None = None) -> None:
        super().__init__(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        self.needed = needed


@contextmanager
def atomic_write(path: Path, needed: int | None = None, *, suffix: str = ".part") -> Iterator[Path]:
    """Yield where to write a file that replaces ``path`` once the block has ended well.

    The data is on the disk before the file gets its name. After a failure ``path`` is as it was, and nothing else is
    left.

    Args:
        needed: how many bytes will be written, if that is known.
        suffix: added to the name until then.

    Raises:
        DiskFullError: if the disk is full. OSError: if the file cannot be written for another reason.
    """
    part = path.with_name(path.name + suffix)
    try:
        yield part
        sync(part)
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno in _FULL and not isinstance(error, DiskFullError):
            raise DiskFullError(path, needed) from error
        raise
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file's data is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can tell."""
    with suppress(OSError):  # Windows opens no folders, and some file systems do not sync them
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def disk_is_full(path: Path, *, needed: int) -> bool:
    """Whether fewer than ``needed`` bytes are free on the disk of a path.

    Of libraries that report a full disk as something else there is only this to go by.
    """
    return free_bytes(path) < needed


def free_bytes(path: Path) -> int:
    """How many bytes are free on the disk of a file or folder, which need not be there yet."""
    return shutil.disk_usage(_existing(path)).free


def write_problem(path: Path, error: OSError, *, needed: int | None = None, kept: str = "") -> str:
    """One line that says why a file cannot be written: of a full disk which, how much is needed, and what is kept.

    Args:
        needed: how many bytes are needed, where the error does not know.
        kept: what is not lost, and what to do.
    """
    if error.errno not in _FULL:
        return f"{path}: cannot be written ({error.strerror or error})"
    needed = needed or getattr(error, "needed", None)
    wanted = "" if needed is None else f"{megabytes(needed)} needed, "
    folder = _existing(path)
    message = f"{path}: the disk is full ({wanted}{megabytes(free_bytes(path))} free in {folder})"
    return f"{message}; {kept}" if kept else message


def megabytes(number: int) -> str:
    """A number of bytes in words: ``12.3 MB``."""
    return f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"


def _existing(path: Path) -> Path:
    """The nearest folder above a path that is there."""
    path = path.absolute()
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), Path(path.anchor))
