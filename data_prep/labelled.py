"""What the scripts for classification sets share: images by class into one file, resuming, summary; sounds read.

Apart from ``data_prep.common``, since it needs torch, which takes seconds to load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.classes import ClassStore, ClassWriter, write_classes
from crowdexit.data.log_mel import read_audio
from crowdexit.data.mel import AudioError
from crowdexit.data.spectrogram import Spectrogram
from crowdexit.data.store import SPLITS
from crowdexit.errors import CrowdExitError

from .common import Skipped, Task, check_size, plain, print_skipped, progress_bar, shown

BATCH = 64  # images that are written at once; a kill costs no more than these


@dataclass(frozen=True)
class Labelled(Task):
    """A sample of a class; ``label`` is a place in the list of classes."""

    label: int


L = TypeVar("L", bound=Labelled)


def prepare_classes(
    destination: Path,
    classes: Sequence[str],
    origin: str,
    tasks: Sequence[L],
    make: Callable[[L], NDArray[np.uint8]],
    *,
    settings: str,
    what: str,
    spectrogram: Spectrogram | None = None,
    notes: Callable[[ClassStore], Sequence[str]] = lambda _: (),
    skipped: Skipped | None = None,
    strict: bool = False,
) -> None:
    """Make every task's images into one classification set, and print the summary.

    An interrupted run of the same settings is gone on with.

    Args:
        destination: the HDF5 file; one that is there already is replaced at the end.
        classes: their names.
        origin: where the set comes from.
        tasks: what to make; ids are unique within a split.
        make: makes a task's image, H×W×3 uint8, or several, n×H×W×3, which get the ids ``ID/0``, ``ID/1``, …
            It raises ``CrowdExitError`` for a sample that cannot be used.
        settings: all that the images depend on.
        what: how the tasks are called in the summary.
        spectrogram: how the images are made, if they are of sounds.
        notes: further lines for the summary, from the finished file.
        skipped: what has been found unusable already, with names that can be shown.
        strict: raise at the first sample that cannot be used.

    Raises:
        CrowdExitError: if a class has no image to train on, the file cannot be written, or by ``strict``.
    """
    skipped = list(skipped or [])
    if strict and skipped:
        raise CrowdExitError(": ".join(skipped[0]))
    with write_classes(destination, classes, origin, settings=settings, spectrogram=spectrogram) as writer:
        todo = [
            task for task in tasks if (task.split, task.id) not in writer and (task.split, f"{task.id}/0") not in writer
        ]
        with progress_bar() as progress:
            skipped += _write_images(writer, progress.track(todo), make, strict=strict)
    with ClassStore(destination) as store:
        print(store.describe())
        further = notes(store)
    if len(todo) < len(tasks):
        print(f"  {len(tasks) - len(todo)} {what} resumed from an interrupted run")
    for line in further:
        print(f"  {line}")
    print_skipped(skipped, what)


def _write_images(
    writer: ClassWriter, tasks: Iterable[L], make: Callable[[L], NDArray[np.uint8]], *, strict: bool
) -> Skipped:
    skipped: Skipped = []
    waiting: list[tuple[L, str, NDArray[np.uint8]]] = []
    for task in tasks:
        try:
            if not plain(task.id):
                raise CrowdExitError("its name is not plain text")
            made = make(task)
        except CrowdExitError as error:
            name, reason = shown(task.id), str(error).removeprefix(f"{task.id}: ")
            if strict:
                raise CrowdExitError(f"{name}: {reason}") from error
            skipped.append((name, reason))
            continue
        if made.ndim == 3:
            waiting.append((task, task.id, made))
        else:
            waiting.extend((task, f"{task.id}/{n}", image) for n, image in enumerate(made))
        if len(waiting) >= BATCH:
            _write(writer, waiting)
            waiting.clear()
    _write(writer, waiting)
    return skipped


def _write(writer: ClassWriter, waiting: Sequence[tuple[L, str, NDArray[np.uint8]]]) -> None:
    """All images of a task are of one split and waiting together, so that a kill leaves all of them or none."""
    for split in SPLITS:
        mine = [one for one in waiting if one[0].split == split]
        if mine:
            images = np.stack([image for _, _, image in mine])
            writer.add(split, images, [task.label for task, _, _ in mine], [id for _, id, _ in mine])


def read_recording(path: Path) -> tuple[NDArray[np.float32], int]:
    """A file of bounded size as :func:`crowdexit.data.log_mel.read_audio` reads it; errors do not name it again.

    Raises:
        CrowdExitError: if it is no file, too large or without readable sound.
    """
    try:
        if path.is_file():  # of anything else read_audio says what is wrong
            check_size(path.stat().st_size, "recording")
        return read_audio(path)
    except AudioError as error:
        raise AudioError(str(error).removeprefix(f"{path}: ")) from error
    except OSError as error:
        raise AudioError(f"cannot be read ({error.strerror})") from error
