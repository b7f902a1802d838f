"""The prepared data set for classification: one HDF5 file, how it is written, and the data set that reads it.

Layout::

    /SPLIT/images     (N, H, W, 3)  uint8   RGB, every image of a file of one size
    /SPLIT/labels     (N,)          int64   place in the list of classes
    /SPLIT/ids        (N,)          string  each once in a split
    /SPLIT/checksums  (N,)          uint32  of each image, verified when it is read
    attributes of the file: classes (their names, a JSON list), origin (where it came from, free text), format, and
    checksum, which covers all but the images

Splits are ``train``, ``val`` and ``test``. A file without ``format``, made by other means, needs no checksums.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import Dataset

from crowdexit.data.spectrogram import Spectrogram
from crowdexit.data.store import SPLITS, PreparedFile, StoreError, open_for_writing, reserve
from crowdexit.data.unlabelled import AudioFolder, ImageFolder
from crowdexit.data.views import normalise, place
from crowdexit.errors import CrowdExitError
from crowdexit.utils.checksum import checksum
from crowdexit.utils.files import DiskFullError, write_problem

FORMAT = "crowdexit-classes-2"
_CHUNK_BYTES = 2**17  # small images share a chunk, of large ones each has its own


def stratified(labels: ArrayLike, size: int, seed: int = 0) -> NDArray[np.bool_]:
    """Draw ``size`` of N samples so that each class keeps its share; the seed fixes which.

    Args:
        labels: (N,) integers.
        size: how many to draw, 0 to N.
        seed: of the draw.

    Returns:
        (N,) bool, true for those that are drawn.
    """
    labels = np.asarray(labels)
    _, place_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    share = counts * size / max(1, len(labels))
    quota = np.floor(share).astype(int)
    # What rounding down has left over goes to the classes that lost most by it.
    most = np.argsort(quota - share, kind="stable")[: size - quota.sum()]
    quota[most] += 1
    rng = np.random.default_rng(seed)
    drawn = np.zeros(len(labels), bool)
    for number, wanted in enumerate(quota):
        drawn[rng.permutation(np.flatnonzero(place_of == number))[:wanted]] = True
    return drawn


class ClassWriter:
    """Adds images to a file that is being written; made by :func:`write_classes`."""

    def __init__(self, file: h5py.File, classes: Sequence[str]) -> None:
        self._file, self._classes = file, list(classes)
        self._ids = {split: set(group["ids"].asstr()[()]) for split, group in file.items()}
        self._size = next((group["images"].shape[1:3] for group in file.values()), None)

    def __contains__(self, key: tuple[str, str]) -> bool:
        """Whether the image (split, id) is there already, from an interrupted run."""
        return key[1] in self._ids.get(key[0], ())

    def __len__(self) -> int:
        """How many images are there."""
        return sum(map(len, self._ids.values()))

    def add(self, split: str, images: NDArray[np.uint8], labels: ArrayLike, ids: Sequence[str]) -> None:
        """Add images to a split; what has been added stays when the run is killed.

        Args:
            split: ``train``, ``val`` or ``test``.
            images: (n, H, W, 3) uint8, RGB.
            labels: (n,) places in the list of classes.
            ids: n of them, none of which the split has yet.

        Raises:
            StoreError: if these do not fit together, the classes or what is there.
            DiskFullError: if there is no room for them; none of them is written then.
        """
        numbers = np.asarray(labels, np.int64)
        if split not in SPLITS:
            raise StoreError(f"the split is {split!r}, not one of {', '.join(SPLITS)}")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise StoreError(f"{split}: images of shape {images.shape} and type {images.dtype}, not n×H×W×3 uint8")
        if not len(images) == len(numbers) == len(ids):
            raise StoreError(f"{split}: {len(images)} images, {len(numbers)} labels and {len(ids)} ids")
        if images.shape[1:3] != (self._size or images.shape[1:3]):
            raise StoreError(f"{split}: images of {_size_of(images.shape)} among others of another size")
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self._classes):
            raise StoreError(f"{split}: labels {numbers.min()} to {numbers.max()} of {len(self._classes)} classes")
        known = self._ids.setdefault(split, set())
        if len(set(ids)) < len(ids) or not known.isdisjoint(ids):
            raise StoreError(f"{split}: duplicate id")
        if not len(images):
            return
        self._size = images.shape[1:3]
        # Chunks are written whole, and those of the four arrays may all be new.
        chunk = max(_CHUNK_BYTES, images[0].nbytes)
        names = sum(len(id.encode(errors="surrogateescape")) + 64 for id in ids)
        reserve(self._file, images.nbytes + names + 2 * chunk + 4096 * (8 + 16 + 8) * (2 + len(ids) // 4096))
        group = self._file[split] if split in self._file else self._create(split, images.shape[1:])
        start = len(known)
        sums = np.array([_image_checksum(image) for image in images], np.uint32)
        for name, values in (("images", images), ("labels", numbers), ("ids", list(ids)), ("checksums", sums)):
            group[name].resize(start + len(ids), axis=0)
            group[name][start:] = values
        known.update(ids)
        # Only what is on the disk is called whole: a kill between the two leaves the old number standing.
        self._file.flush()
        group.attrs["whole"] = len(known)
        self._file.flush()

    def _create(self, split: str, shape: tuple[int, ...]) -> h5py.Group:
        group = self._file.create_group(split)
        each = max(1, _CHUNK_BYTES // int(np.prod(shape)))
        group.create_dataset("images", (0, *shape), np.uint8, maxshape=(None, *shape), chunks=(each, *shape))
        group.create_dataset("labels", (0,), np.int64, maxshape=(None,), chunks=(4096,))
        group.create_dataset("ids", (0,), h5py.string_dtype(), maxshape=(None,), chunks=(4096,))
        group.create_dataset("checksums", (0,), np.uint32, maxshape=(None,), chunks=(4096,))
        return group

    def finish(self) -> None:
        """Check the whole of it, take away what was only there for going on, and add the file's checksum.

        Raises:
            StoreError: if a class has no image to train on.
        """
        there = set(self._file["train/labels"][()]) if "train" in self._file else set()
        missing = [name for number, name in enumerate(self._classes) if number not in there]
        if missing:
            more = f" (nor have {len(missing) - 1} other classes)" if len(missing) > 1 else ""
            raise StoreError(f"class {missing[0]!r} has no image to train on{more}")
        reserve(self._file, 0)
        for group in self._file.values():
            del group.attrs["whole"]
        arrays = {
            split: (group["labels"][()], list(group["ids"].asstr()[()]), group["checksums"][()])
            for split, group in self._file.items()
        }
        self._file.attrs["format"] = FORMAT
        self._file.attrs["checksum"] = _file_checksum(self._file, arrays)


def _image_checksum(image: NDArray[np.uint8]) -> int:
    return int(checksum(np.ascontiguousarray(image).tobytes()), 16)


def _file_checksum(
    file: h5py.File, arrays: Mapping[str, tuple[NDArray[np.int64], list[str], NDArray[np.uint32]]]
) -> str:
    """The checksum of a file's attributes, and of each split's labels, ids and image checksums."""
    attributes = {name: str(value) for name, value in file.attrs.items() if name != "checksum"}
    parts = [json.dumps([attributes, sorted(arrays)], sort_keys=True).encode()]
    for _, (labels, ids, sums) in sorted(arrays.items()):
        parts += [labels.tobytes(), json.dumps(ids).encode(), sums.tobytes()]
    return checksum(*parts)


@contextmanager
def write_classes(
    path: Path,
    classes: Sequence[str],
    origin: str,
    *,
    settings: str | None = None,
    spectrogram: Spectrogram | None = None,
) -> Iterator[ClassWriter]:
    """Write a classification set, which appears under its name only when the block has ended well.

    Args:
        path: the HDF5 file; one that is there already is replaced at the end.
        classes: their names; a label is a place in this list.
        origin: where the set comes from, kept in the file.
        settings: all that the images depend on. With it, what an interrupted run of the same settings has
            left in ``path`` + ``.part`` is gone on with; without, nothing is left.
        spectrogram: how the images were made, if they are of sounds.

    Raises:
        StoreError: if there are not at least two different classes, or one has no image to train on in the
            end, or the file cannot be written.
    """
    if len(classes) < 2 or len(set(classes)) < len(classes) or not all(classes):
        raise StoreError(f"{path.name}: at least two different class names are needed")
    if path.is_dir():
        raise StoreError(f"{path}: a folder, not a file to write to")
    part = path.with_name(path.name + ".part")
    fingerprint = settings and sha256(f"{FORMAT} {settings}".encode(errors="surrogateescape")).hexdigest()
    writer = None
    try:
        _take_up(part, fingerprint)
        try:
            with open_for_writing(path, seal=lambda _: None) as file:
                writer = ClassWriter(file, classes)
                file.attrs.update({"classes": json.dumps(list(classes)), "origin": origin})
                if spectrogram is not None:
                    file.attrs["sound"] = json.dumps(spectrogram.to_dict())
                if fingerprint:
                    file.attrs["prepared_with"] = fingerprint
                yield writer
                try:
                    writer.finish()
                except StoreError:
                    fingerprint = None  # going on would end no better
                    raise
        except BaseException:
            if not fingerprint:
                part.unlink(missing_ok=True)
            raise
    except OSError as error:
        written = len(writer) if writer is not None else 0
        kept = "nothing is kept; free some space and start again"
        if fingerprint and written:
            kept = f"{written} images are kept in {part.name}; free some space, and the same command resumes it"
        raise StoreError(write_problem(path, error, kept=kept)) from error


def _take_up(part: Path, fingerprint: str | None) -> None:
    """Cut an interrupted run's file back to what is whole; one of other settings, or a broken one, is removed."""
    if not part.is_file():
        return
    try:
        with h5py.File(part, "r+") as file:
            if fingerprint and file.attrs["prepared_with"] == fingerprint:
                reserve(file, 0)
                for group in file.values():
                    whole = int(group.attrs["whole"])
                    for dataset in group.values():
                        if len(dataset) < whole:
                            raise ValueError("shorter than it says")
                        dataset.resize(whole, axis=0)
                return
    except BlockingIOError as error:
        raise StoreError(f"{part}: another run is writing it") from error
    except DiskFullError:
        raise
    except Exception:  # HDF5 has many for a file that was left in the middle of a write
        pass
    part.unlink()


@dataclass(frozen=True)
class _Opened:
    """A file whose form has been checked; arrays by split. ``sums`` is empty where the file has no checksums."""

    file: h5py.File
    classes: list[str]
    spectrogram: Spectrogram | None
    images: dict[str, h5py.Dataset]
    labels: dict[str, NDArray[np.int64]]
    ids: dict[str, list[str]]
    sums: dict[str, NDArray[np.uint32]]


class ClassStore(PreparedFile):
    """Reads a prepared classification set.

    Every method but the constructor raises ``StoreError`` if the file is damaged or of another form.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._opened: _Opened | None = None

    def __getstate__(self) -> dict[str, object]:
        return {**super().__getstate__(), "_opened": None}

    def close(self) -> None:
        super().close()
        self._opened = None

    def _open(self) -> _Opened:
        if self._opened is None:
            try:
                self._opened = self._check(self.file)
            except Exception as error:  # HDF5 has many for a damaged file
                self.close()
                if isinstance(error, CrowdExitError):
                    raise
                raise StoreError(f"{self.path}: not a prepared classification set, or damaged") from error
        return self._opened

    def _check(self, file: h5py.File) -> _Opened:
        classes = json.loads(file.attrs["classes"])
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise StoreError(f"{self.path}: its classes are not a list of names")
        spectrogram = Spectrogram(**json.loads(file.attrs["sound"])) if "sound" in file.attrs else None
        opened = _Opened(file, classes, spectrogram, {}, {}, {}, {})
        format = file.attrs.get("format")
        if format not in (None, FORMAT):
            raise StoreError(f"{self.path}: written by another version ({format!r}); prepare it again")
        sizes = set()
        for split in (split for split in SPLITS if split in file):
            images, labels, ids = (file[split][name] for name in ("images", "labels", "ids"))
            if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
                raise StoreError(f"{self.path}: {split}/images is {images.shape} {images.dtype}, not N×H×W×3 uint8")
            if labels.dtype != np.int64 or not labels.shape == ids.shape == images.shape[:1]:
                shapes = f"{images.shape[0]} images, labels {labels.shape} {labels.dtype}, ids {ids.shape}"
                raise StoreError(f"{self.path}: {split} holds {shapes}")
            numbers = labels[()]
            wrong = np.flatnonzero((numbers < 0) | (numbers >= len(classes)))
            if len(wrong):
                raise StoreError(
                    f"{self.path}: {split} image {wrong[0]} has the label {numbers[wrong[0]]}, "
                    f"and there are {len(classes)} classes"
                )
            opened.images[split], opened.labels[split] = images, numbers
            try:
                opened.ids[split] = list(ids.asstr()[()])
            except Exception as error:
                raise StoreError(f"{self.path}: the ids of {split} are damaged") from error
            if format is not None:
                opened.sums[split] = np.asarray(file[split]["checksums"][()], np.uint32)
            sizes.add(images.shape[1:3])
        if len(sizes) != 1:
            raise StoreError(f"{self.path}: {'images of several sizes' if sizes else 'holds no images'}")
        if format is not None:
            arrays = {split: (opened.labels[split], opened.ids[split], sums) for split, sums in opened.sums.items()}
            if file.attrs["checksum"] != _file_checksum(file, arrays):
                raise StoreError(f"{self.path}: damaged (the checksum of its labels, ids and names does not match)")
        return opened

    @property
    def classes(self) -> list[str]:
        """The names of the classes; a label is a place in this list."""
        return list(self._open().classes)

    @property
    def origin(self) -> str:
        """Where the set came from, free text."""
        return str(self._open().file.attrs.get("origin", ""))

    @property
    def spectrogram(self) -> Spectrogram | None:
        """How the images were made of sounds, or None: they are images of something else."""
        return self._open().spectrogram

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the stored images."""
        height, width = next(iter(self._open().images.values())).shape[1:3]
        return int(width), int(height)

    def splits(self) -> list[str]:
        return list(self._open().images)

    def ids(self, split: str) -> list[str]:
        """The ids of a split, in the order of its images."""
        self.labels(split)
        return list(self._open().ids[split])

    def labels(self, split: str) -> NDArray[np.int64]:
        """The labels of a split, (N,).

        Raises:
            StoreError: also if the split is not there.
        """
        try:
            return self._open().labels[split]
        except KeyError:
            there = ", ".join(self.splits())
            raise StoreError(f"{self.path}: no split {split!r} (it has {there})") from None

    def image(self, split: str, index: int) -> NDArray[np.uint8]:
        """One image, (H, W, 3) uint8, RGB.

        Raises:
            StoreError: also if it is not there.
        """
        if not 0 <= index < len(self.labels(split)):
            raise StoreError(f"{self.path}: {split} has no image {index}")
        opened = self._open()
        try:
            image = np.asarray(opened.images[split][index], np.uint8)
        except Exception as error:  # HDF5 has many for a damaged file
            raise StoreError(f"{self.path}: {split} image {index} is damaged") from error
        if split in opened.sums and opened.sums[split][index] != _image_checksum(image):
            raise StoreError(f"{self.path}: {split} image {index} is damaged (its checksum does not match)")
        return image

    def describe(self) -> str:
        """What is in the file, a line a split: images, and how many the smallest and the largest class have."""
        opened = self._open()
        total = sum(len(labels) for labels in opened.labels.values())
        width, height = self.size
        lines = [f"{self.path.name}: {total} images of {width}×{height}, {len(opened.classes)} classes"]
        for split, labels in opened.labels.items():
            each = np.bincount(labels, minlength=len(opened.classes))
            spread = f"{each.min()}" if each.min() == each.max() else f"{each.min()} to {each.max()}"
            lines.append(f"  {split:5} {len(labels):6} images, {spread} a class")
        return "\n".join(lines)


def _size_of(shape: tuple[int, ...]) -> str:
    """N×H×W×3 as people say it: width×height."""
    return f"{shape[2]}×{shape[1]}"


class ClassDataset(Dataset[dict[str, Any]]):
    """Images of a prepared classification set as tensors.

    An item is asked for by ``(index, draw)``: what is random about it depends on the seed, the draw and the
    image alone, so that neither workers nor processes nor a resumed run change it. A plain index draws 0.

    Items: ``image`` 3×H×W float32 normalised, ``label`` int64 (a tensor without dimensions), ``id``.

    Args:
        store: the prepared file.
        split: of it.
        size: (width, height) of the items; stored images of another size are stretched to it.
        augment: whether images are moved by up to an eighth of their side and half of them mirrored.
        seed: of the augmentation.

    Raises:
        StoreError: if the split is not there; from an item, if its image is damaged.
    """

    def __init__(
        self,
        store: ClassStore | ImageFolder | AudioFolder,
        split: str,
        *,
        size: tuple[int, int],
        augment: bool = False,
        seed: int = 0,
    ) -> None:
        self.store, self.split, self.size, self.augment, self.seed = store, split, size, augment, seed
        self.ids = store.ids(split)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        id = self.ids[index]  # an index beyond the end is an IndexError, by which loops know where to stop
        rng = np.random.default_rng((self.seed, index, draw))
        image = self.store.image(self.split, index)
        if self.augment:
            image = shifted(image, rng)
        if image.shape[1::-1] != self.size:
            shrinks = self.size[0] * self.size[1] < image.shape[0] * image.shape[1]
            interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
            image = np.asarray(
                cv2.resize(np.ascontiguousarray(image), self.size, interpolation=interpolation), np.uint8
            )
        return {
            "image": torch.from_numpy(normalise(image)),
            "label": torch.tensor(int(self.store.labels(self.split)[index]), dtype=torch.int64),
            "id": id,
        }


def shifted(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """A random crop of an image padded by an eighth of each side, mirrored half of the time; the shape stays.

    The padding has the mean colour, which is zero once normalised.
    """
    height, width = image.shape[:2]
    x_room, y_room = width // 8, height // 8
    padded = place(image, (width + 2 * x_room, height + 2 * y_room), (x_room, y_room))
    x, y = int(rng.integers(2 * x_room + 1)), int(rng.integers(2 * y_room + 1))
    window = padded[y : y + height, x : x + width]
    return window[:, ::-1] if rng.random() < 0.5 else window
