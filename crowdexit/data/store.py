"""The prepared data set for counting: one HDF5 file that training, evaluation and preparation share.

Layout (house format)::

    /SPLIT/ID/image          (n,)     uint8    the encoded picture's bytes (JPEG or PNG)
    /SPLIT/ID/points         (N, 2)   float32  heads, x y in pixels of the stored picture
    /SPLIT/ID/log_mel        (96, 64) float32  absent without sound
    /SPLIT/ID/log_mel_takes  (T, 96, 64) float16  further simulated seconds for training, optional
    /SPLIT/ID/density        (h, w)   float32  only with --store-density
    attributes of ID: count, audio_source (recorded, simulated, none), width, height, and where it came from

Splits are ``train``, ``val`` and ``test``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError

AudioSource = Literal["recorded", "simulated", "none"]
SPLITS = ("train", "val", "test")
LOG_MEL_SHAPE = (96, 64)
_OWN_ATTRIBUTES = {"count", "audio_source", "width", "height"}


class StoreError(CrowdExitError):
    """A prepared file that is missing, damaged or not in the house format."""


@dataclass(frozen=True)
class StoredSample:
    """One picture of a prepared set.

    ``image``: encoded bytes, (n,) uint8. ``points``: (N, 2) float32, x y in pixels of the stored picture.
    ``count``: the number of heads (with published density matrices only: their sum, which need not be whole).
    ``log_mel``: (96, 64) float32 or None. ``takes``: (T, 96, 64) float16 or None, further simulated seconds.
    ``density``: (h, w) float32 or None. ``origin``: where it came from, free text by key.
    """

    id: str
    split: str
    image: NDArray[np.uint8]
    points: NDArray[np.float32]
    width: int
    height: int
    count: float
    log_mel: NDArray[np.float32] | None = None
    audio_source: AudioSource = "none"
    takes: NDArray[np.float16] | None = None
    density: NDArray[np.float32] | None = None
    origin: Mapping[str, str] = field(default_factory=dict)


def write_sample(file: h5py.File, sample: StoredSample) -> None:
    """Add a sample to an open file; a sample already there under its split and id is replaced whole."""
    if sample.split not in SPLITS:
        raise StoreError(f"{sample.id}: the split is {sample.split!r}, not one of {', '.join(SPLITS)}")
    if (sample.log_mel is None) != (sample.audio_source == "none"):
        raise StoreError(f"{sample.id}: audio_source {sample.audio_source!r} does not fit the log-mel")
    path = f"{sample.split}/{sample.id}"
    if path in file:
        del file[path]
    group = file.create_group(path)
    arrays = {
        "image": (sample.image, np.uint8),
        "points": (sample.points, np.float32),
        "log_mel": (sample.log_mel, np.float32),
        "log_mel_takes": (sample.takes, np.float16),
        "density": (sample.density, np.float32),
    }
    for name, (array, dtype) in arrays.items():
        if array is not None:
            group.create_dataset(name, data=np.asarray(array, dtype))
    group.attrs.update(
        {
            **sample.origin,
            "count": float(sample.count),
            "audio_source": sample.audio_source,
            "width": sample.width,
            "height": sample.height,
        }
    )


@contextmanager
def open_for_writing(path: Path) -> Iterator[h5py.File]:
    """Open ``path`` beside its final name (``.part``), resumable: renamed into place when the block ends well.

    After a kill the ``.part`` file stays and the next run goes on in it; ``ID in file[split]`` tells what is
    there already. A ``.part`` file that cannot be opened any more is started anew.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = h5py.File(part, "a")
    except OSError:
        part.unlink(missing_ok=True)
        file = h5py.File(part, "a")
    try:
        yield file
    finally:
        file.close()
    part.replace(path)


class PreparedFile:
    """A prepared HDF5 file, opened lazily once a process, so that it can travel to data-loading workers.

    Raises:
        StoreError: if there is no such file; from ``file``, if it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise StoreError(f"{self.path}: no such prepared file")
        self._file: h5py.File | None = None

    @property
    def file(self) -> h5py.File:
        if self._file is None:
            try:
                self._file = h5py.File(self.path, "r")
            except OSError as error:
                raise StoreError(f"{self.path}: not a readable HDF5 file (damaged or cut short)") from error
        return self._file

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "_file": None}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Store(PreparedFile):
    """Reads a prepared set for counting."""

    def splits(self) -> list[str]:
        return [split for split in SPLITS if split in self.file]

    def ids(self, split: str, pattern: str = "*") -> list[str]:
        """The ids of a split in alphabetical order, those that match a shell pattern.

        Raises:
            StoreError: if the split is not there, no id of it matches, or the file was prepared for classes.
        """
        if "classes" in self.file.attrs:
            raise StoreError(f"{self.path}: prepared for telling classes apart, not for counting")
        if split not in self.file:
            raise StoreError(f"{self.path}: no split {split!r} (it has {', '.join(self.splits()) or 'none'})")
        ids = [key for key in self.file[split] if fnmatchcase(key, pattern)]
        if not ids:
            raise StoreError(f"{self.path}: no sample in {split!r} matches {pattern!r}")
        return ids

    def counts(self, split: str) -> dict[str, float]:
        """The count of every sample of a split by its id, without reading pictures.

        Raises:
            StoreError: as :meth:`ids`, or if one has none.
        """
        try:
            return {key: float(self.file[split][key].attrs["count"]) for key in self.ids(split)}
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise StoreError(f"{self.path}: not prepared for counting, or damaged") from error

    def read(self, split: str, id: str, *, with_takes: bool = False) -> StoredSample:
        """Read one sample.

        Raises:
            StoreError: if it is not there or a part of it is missing, of the wrong shape or damaged.
        """
        try:
            group = self.file[split][id]
            attributes = dict(group.attrs)
            source = attributes["audio_source"]
            if source not in get_args(AudioSource):
                raise StoreError(f"{self.path}: {split}/{id} has the audio_source {source!r}")
            log_mel = group["log_mel"][()] if "log_mel" in group else None
            if log_mel is not None and log_mel.shape != LOG_MEL_SHAPE:
                raise StoreError(f"{self.path}: {split}/{id} has a log-mel of shape {log_mel.shape}")
            return StoredSample(
                id=id,
                split=split,
                image=group["image"][()],
                points=group["points"][()].reshape(-1, 2),
                width=int(attributes["width"]),
                height=int(attributes["height"]),
                count=float(attributes["count"]),
                log_mel=log_mel,
                audio_source=source,
                takes=group["log_mel_takes"][()] if with_takes and "log_mel_takes" in group else None,
                density=group["density"][()] if "density" in group else None,
                origin={k: str(v) for k, v in attributes.items() if k not in _OWN_ATTRIBUTES},
            )
        except (KeyError, OSError, ValueError) as error:
            raise StoreError(f"{self.path}: {split}/{id} is missing or damaged") from error
