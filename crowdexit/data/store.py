"""The prepared data set for counting: one HDF5 file that training, evaluation and preparation share.

Layout (house format)::

    /SPLIT/ID/image          (n,)     uint8    the encoded image's bytes (JPEG or PNG)
    /SPLIT/ID/points         (N, 2)   float32  heads, x y in pixels of the image as it is displayed
    /SPLIT/ID/log_mel        (96, 64) float32  absent without audio
    /SPLIT/ID/log_mel_takes  (T, 96, 64) float16  further simulated seconds for training, optional
    /SPLIT/ID/density        (h, w)   float32  only with --store-density
    attributes of ID: count, audio_source (recorded, simulated, none), and where it came from; width and height of
    the image as it is displayed (without them, its header tells)

Splits are ``train``, ``val`` and ``test``. "As it is displayed" means mirrored and turned as the image's EXIF
orientation says.

What this project writes is marked ``format`` and has checksums: each sample's attribute ``checksums`` has one for each
part (JSON), which is verified when that part is read; the file's attribute ``checksum`` covers the list of samples. A
file without ``format``, made by other means, needs none.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, get_args

import h5py
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.image import ImageError, decode_pixels, read_header
from crowdexit.errors import CrowdExitError
from crowdexit.utils.checksum import checksum
from crowdexit.utils.files import DiskFullError, sync, sync_folder
from crowdexit.utils.paths import is_file

AudioSource = Literal["recorded", "simulated", "none"]
SPLITS = ("train", "val", "test")
LOG_MEL_SHAPE = (96, 64)
FORMAT = "crowdexit-store-2"
CHECKSUMS = "checksums"  # the last that is written of a sample
_OWN_ATTRIBUTES = {"count", "audio_source", "width", "height", CHECKSUMS}
_ATTRIBUTES = "attributes"  # under which the checksums have all of a sample that is no array
_MOST_BYTES = 2**31  # of one part of a sample; a damaged header may ask for any number
# HDF5's own structures have checksums from version 1.8 on; without, a damaged one can end the process.
_VERSION = ("v108", "v108")
_ROOM = 2**18  # bytes on the disk for what HDF5 writes around the arrays


class StoreError(CrowdExitError):
    """A prepared file that is missing, damaged or not in the house format."""


@dataclass(frozen=True)
class StoredSample:
    """One image of a prepared set.

    ``image``: encoded bytes, (n,) uint8. ``points``: (N, 2) float32, x y in pixels of the image as it is displayed.
    ``width``, ``height``: of the image as it is displayed.
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


@dataclass(frozen=True)
class SampleInfo:
    """What is known of a sample without reading its arrays.

    ``heads``: the number of annotated points. ``parts``: the names of the arrays that are there.
    """

    count: float
    audio_source: AudioSource
    heads: int
    parts: frozenset[str]


def decode_image(sample: StoredSample) -> NDArray[np.uint8]:
    """A sample's image as it is displayed, H×W×3 uint8 RGB: the decoder that counting uses, so that heads fit it.

    Raises:
        StoreError: if it is damaged, or of another size than the sample says.
    """
    name = f"{sample.split}/{sample.id}"
    try:
        image = decode_pixels(sample.image.tobytes(), name)
    except ImageError as error:
        raise StoreError(f"{name}: the stored image is damaged ({str(error).removeprefix(f'{name}: ')})") from error
    height, width = image.shape[:2]
    if (width, height) != (sample.width, sample.height):
        raise StoreError(
            f"{name}: the image is displayed at {width}×{height}, but its width and height say "
            f"{sample.width}×{sample.height}, so its heads may not fit it; prepare it again"
        )
    return image


def write_sample(file: h5py.File, sample: StoredSample) -> None:
    """Add a sample to an open file; a sample already there under its split and id is replaced whole.

    Raises:
        StoreError: for a split or audio source that makes no sense.
        DiskFullError: if there is no room for it; nothing of it is written then.
    """
    if sample.split not in SPLITS:
        raise StoreError(f"{sample.id}: the split is {sample.split!r}, not one of {', '.join(SPLITS)}")
    if (sample.log_mel is None) != (sample.audio_source == "none"):
        raise StoreError(f"{sample.id}: audio_source {sample.audio_source!r} does not fit the log-mel")
    wanted = {
        "image": (sample.image, np.uint8),
        "points": (sample.points, np.float32),
        "log_mel": (sample.log_mel, np.float32),
        "log_mel_takes": (sample.takes, np.float16),
        "density": (sample.density, np.float32),
    }
    arrays = {name: np.asarray(array, dtype) for name, (array, dtype) in wanted.items() if array is not None}
    reserve(file, sum(array.nbytes for array in arrays.values()))
    path = f"{sample.split}/{sample.id}"
    if path in file:
        del file[path]
    group = file.create_group(path)
    for name, array in arrays.items():
        group.create_dataset(name, data=array)
    attributes = {
        **{key: str(value) for key, value in sample.origin.items()},
        "count": float(sample.count),
        "audio_source": str(sample.audio_source),
        "width": int(sample.width),
        "height": int(sample.height),
    }
    shapes = {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    sums = {name: _array_checksum(array) for name, array in arrays.items()}
    group.attrs.update(attributes)
    group.attrs[CHECKSUMS] = json.dumps({_ATTRIBUTES: _info_checksum(path, attributes, shapes), **sums})


def _array_checksum(array: NDArray[Any]) -> str:
    return checksum(np.ascontiguousarray(array).tobytes())


def _info_checksum(path: str, attributes: Mapping[str, Any], shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    """The checksum of what a sample is called, of its attributes, and of the types and shapes of its arrays."""
    return checksum(json.dumps([path, attributes, shapes], sort_keys=True).encode())


def _seal(file: h5py.File) -> None:
    """Mark a whole file for counting, with the checksum of its list of samples."""
    reserve(file, 0)
    file.attrs["format"] = FORMAT
    file.attrs["checksum"] = _list_checksum(file)


def _list_checksum(file: h5py.File) -> str:
    attributes = {name: _plain(value) for name, value in file.attrs.items() if name != "checksum"}
    return checksum(json.dumps([attributes, {split: sorted(file[split]) for split in file}], sort_keys=True).encode())


def _plain(value: Any) -> Any:
    """An attribute's value as plain text or number, whoever wrote it."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value if isinstance(value, str) else str(value)


def reserve(file: h5py.File, size: int) -> None:
    """Take the room on the disk for ``size`` more bytes of arrays before HDF5 writes them.

    HDF5 does not survive a failed write: it ends the process when the file is closed.

    Raises:
        DiskFullError: if there is no room; the file is as it was.
    """
    if file.driver != "sec2":
        return
    needed = size + _ROOM
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file.id.get_vfd_handle(), file.id.get_filesize(), needed)
        except OSError:
            pass  # full, or a file system that cannot tell so; the free space decides
        else:
            return
    if shutil.disk_usage(Path(file.filename).parent).free < needed:
        raise DiskFullError(file.filename, needed)


@contextmanager
def open_for_writing(path: Path, seal: Callable[[h5py.File], None] = _seal) -> Iterator[h5py.File]:
    """Open ``path`` beside its final name (``.part``), resumable: renamed into place when the block ends well.

    After a kill, or on a full disk, the ``.part`` file stays and the next run goes on in it; ``ID in file[split]``
    tells what is there already. A ``.part`` file that cannot be opened any more is started anew.

    Args:
        seal: called at the end, with what makes the file whole.

    Raises:
        OSError: if it cannot be written; DiskFullError: if the disk is full.
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        file = _open_part(part)
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, (BlockingIOError, DiskFullError)):
            raise
        part.unlink(missing_ok=True)
        file = _open_part(part)
    try:
        reserve(file, 0)
        yield file
        seal(file)
    finally:
        if file:  # not closed yet
            file.flush()
            size = file.id.get_filesize()
            file.close()
            os.truncate(part, min(size, part.stat().st_size))  # what was reserved and not needed
    sync(part)
    part.replace(path)
    sync_folder(path.parent)


def _open_part(part: Path) -> h5py.File:
    """Open a file for writing; where there is none, an empty one is made without HDF5, which a full disk would end."""
    if not part.exists():
        empty = BytesIO()
        h5py.File(empty, "w", libver=_VERSION).close()
        try:
            part.write_bytes(empty.getvalue())
        except OSError:
            part.unlink(missing_ok=True)
            raise
    return h5py.File(part, "r+", libver=_VERSION)


class PreparedFile:
    """A prepared HDF5 file, opened lazily once a process, so that it can travel to data-loading workers.

    Raises:
        StoreError: if there is no such file; from ``file``, if it cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not is_file(self.path):
            raise StoreError(f"{self.path}: no such prepared file")
        self._file: h5py.File | None = None

    @property
    def file(self) -> h5py.File:
        if self._file is None:
            try:
                file = h5py.File(self.path, "r")
            except Exception as error:  # HDF5 has many for a damaged file
                raise StoreError(f"{self.path}: not a readable HDF5 file (damaged or cut short)") from error
            try:
                with self._damage(""):
                    self._verify(file)
            except StoreError:
                file.close()
                raise
            self._file = file
        return self._file

    def _verify(self, file: h5py.File) -> None:
        """What is checked once when the file has been opened."""

    @contextmanager
    def _damage(self, what: str) -> Iterator[None]:
        """Whatever a damaged file makes HDF5, or the code that trusts it, raise becomes a StoreError."""
        try:
            yield
        except CrowdExitError:
            raise
        except Exception as error:
            prefix = f"{what}: " if what else ""
            raise StoreError(f"{self.path}: {prefix}damaged, or of another form ({_first_line(error)})") from error

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


def _first_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].strip("'\"").split())[:200] or type(error).__name__


class Store(PreparedFile):
    """Reads a prepared set for counting.

    Examples:
        >>> with Store("crowd.h5") as store:
        ...     print(store.splits(), store.counts("val"))
        ['train', 'val'] {'B_IMG_2': 2.0}
    """

    def _verify(self, file: h5py.File) -> None:
        if "classes" in file.attrs:
            raise StoreError(f"{self.path}: prepared for classification, not for counting")
        format = _plain(file.attrs.get("format", ""))
        if format and format != FORMAT:
            raise StoreError(f"{self.path}: written by another version ({format!r}); prepare it again")
        if format and _plain(file.attrs.get("checksum", "")) != _list_checksum(file):
            raise StoreError(f"{self.path}: damaged (the checksum of its list of samples does not match)")

    def splits(self) -> list[str]:
        file = self.file
        with self._damage(""):
            return [split for split in SPLITS if split in file]

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether there is a sample (split, id)."""
        file = self.file
        with self._damage(""):
            return key[0] in SPLITS and key[0] in file and key[1] in file[key[0]]

    def ids(self, split: str, pattern: str = "*") -> list[str]:
        """The ids of a split in alphabetical order, those that match a shell pattern.

        Raises:
            StoreError: if the split is not there, no id of it matches, or the file was prepared for classes.
        """
        file = self.file
        with self._damage(""):
            if split not in file:
                raise StoreError(f"{self.path}: no split {split!r} (it has {', '.join(self.splits()) or 'none'})")
            ids = [key for key in file[split] if fnmatchcase(key, pattern)]
        if not ids:
            raise StoreError(f"{self.path}: no sample in {split!r} matches {pattern!r}")
        return ids

    def counts(self, split: str) -> dict[str, float]:
        """The count of every sample of a split by its id, without reading images.

        Raises:
            StoreError: as :meth:`ids` and :meth:`info`.
        """
        return {id: self.info(split, id).count for id in self.ids(split)}

    def info(self, split: str, id: str) -> SampleInfo:
        """What is known of a sample without reading its arrays.

        Raises:
            StoreError: as :meth:`read`.
        """
        with self._damage(f"{split}/{id}"):
            sample = self._sample(split, id)
            return SampleInfo(sample.count, sample.source, sample.shapes["points"][1][0], frozenset(sample.shapes))

    def read(self, split: str, id: str, *, with_takes: bool = False) -> StoredSample:
        """Read one sample.

        Raises:
            StoreError: if it is not there, a part of it is missing or of the wrong shape, or it is damaged: its
                checksum does not match.
        """
        with self._damage(f"{split}/{id}"):
            sample = self._sample(split, id)
            image = sample.array("image", np.uint8)
            width, height = sample.attributes.get("width"), sample.attributes.get("height")
            if width is None or height is None:
                try:
                    header = read_header(image.tobytes(), f"{self.path}: {split}/{id}")
                except ImageError as error:
                    raise StoreError(str(error)) from error
                width, height = header.width, header.height
            log_mel = sample.array("log_mel", np.float32) if "log_mel" in sample.shapes else None
            if log_mel is not None and log_mel.shape != LOG_MEL_SHAPE:
                raise StoreError(f"{self.path}: {split}/{id} has a log-mel of shape {log_mel.shape}")
            takes = with_takes and "log_mel_takes" in sample.shapes
            return StoredSample(
                id=id,
                split=split,
                image=image,
                points=sample.array("points", np.float32),
                width=int(width),
                height=int(height),
                count=sample.count,
                log_mel=log_mel,
                audio_source=sample.source,
                takes=sample.array("log_mel_takes", np.float16) if takes else None,
                density=sample.array("density", np.float32) if "density" in sample.shapes else None,
                origin={k: str(v) for k, v in sample.attributes.items() if k not in _OWN_ATTRIBUTES},
            )

    def _sample(self, split: str, id: str) -> _Sample:
        """A sample whose parts are all there; what is no array is verified."""
        where = f"{self.path}: {split}/{id}"
        if (split, id) not in self:
            raise StoreError(f"{where}: no such sample")
        group = self.file[split][id]
        attributes = {name: _plain(value) for name, value in group.attrs.items()}
        shapes = {name: (group[name].dtype.name, tuple(group[name].shape)) for name in group if name in _ARRAYS}
        for name, there in (("image", shapes), ("points", shapes), ("count", attributes), ("audio_source", attributes)):
            if name not in there:
                raise StoreError(f"{where} lacks {name!r} (it has {', '.join([*shapes, *attributes]) or 'nothing'})")
        sums: dict[str, str] = {}
        if CHECKSUMS in attributes:
            sums = json.loads(attributes.pop(CHECKSUMS))
            if sums[_ATTRIBUTES] != _info_checksum(f"{split}/{id}", attributes, shapes):
                raise StoreError(f"{where} is damaged (the checksum of its attributes does not match)")
        elif "format" in self.file.attrs:
            raise StoreError(f"{where} is damaged (it has no checksum)")
        source = attributes["audio_source"]
        if source not in get_args(AudioSource):
            raise StoreError(f"{where} has the audio_source {source!r}, not one of {', '.join(get_args(AudioSource))}")
        kind, shape = shapes["image"]
        if kind != "uint8" or len(shape) != 1:
            raise StoreError(f"{where}: 'image' is {kind} of shape {shape}, not (n,) uint8: an encoded image's bytes")
        kind, shape = shapes["points"]
        if 0 in shape:
            shapes["points"] = (kind, (0, 2))
        elif len(shape) != 2 or shape[1] != 2:
            raise StoreError(f"{where}: 'points' has the shape {shape}, not N×2")
        count = float(attributes["count"])
        if not 0 <= count < math.inf:
            raise StoreError(f"{where} has the count {count}")
        return _Sample(where, group, attributes, shapes, sums, source, count)


_ARRAYS = ("image", "points", "log_mel", "log_mel_takes", "density")


@dataclass(frozen=True)
class _Sample:
    """A sample in an open file: attributes, types and shapes of its arrays, checksums by array (none: not known)."""

    where: str
    group: h5py.Group
    attributes: Mapping[str, Any]
    shapes: Mapping[str, tuple[str, tuple[int, ...]]]
    sums: Mapping[str, str]
    source: AudioSource
    count: float

    def array(self, name: str, dtype: Any) -> NDArray[Any]:
        """One of the arrays, verified."""
        dataset = self.group[name]
        if dataset.nbytes > _MOST_BYTES:
            raise StoreError(f"{self.where}: {name!r} is too large ({dataset.nbytes:,} bytes)")
        array = np.asarray(dataset[()])
        if self.sums and self.sums.get(name) != _array_checksum(array):
            raise StoreError(f"{self.where} is damaged (the checksum of {name!r} does not match)")
        return np.asarray(array.reshape(self.shapes[name][1]), dtype)
