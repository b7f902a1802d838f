"""Exported stages and exits: read, checked and run without PyTorch.

    from crowdexit.inference.exported import Exported

    print(Exported("street-int8").count("street.jpg"))

A folder that ``crowdexit export`` wrote holds a model for every stage and every exit, OpenVINO's or ONNX, and
``manifest.json``, which says how they belong together. What is here needs numpy, OpenCV, Pillow, pydantic and the
library that runs the models.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crowdexit.chain import walk
from crowdexit.data.picture import MEAN, STD, normalise, read_picture, tile_boxes, views
from crowdexit.errors import CrowdExitError
from crowdexit.inference.runtimes.arrays import ArrayChain, Port, Ports, Record, exit_piece, stage_piece
from crowdexit.inference.runtimes.engines import Engine, OnnxEngine, OpenVINOEngine, Shapes, installed

MANIFEST = "manifest.json"
FORMAT = "crowdexit-export-1"
_MOST_TEXT = 2**22
_MOST_BYTES = 2**32  # of all models together
_Side = Annotated[int, Field(gt=0, le=16_384)]
# A name in the folder, never a path.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]

Library = Literal["openvino", "onnx"]
Precision = Literal["fp32", "bf16", "int8"]


class ExportError(CrowdExitError):
    """Something that cannot be exported, or an exported folder that is damaged."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FilePart(_Part):
    """A file of the folder: its length in bytes, and the SHA-256 of what is in it."""

    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PiecePart(_Part):
    """A stage or an exit: the files of its model (OpenVINO's has two), and its ports in the model's order.

    Shapes are those of one sample; every array has the batch before them.
    """

    files: tuple[_FileName, ...] = Field(min_length=1, max_length=2)
    takes: tuple[Port, ...]
    gives: tuple[Port, ...]


class NetworkPart(_Part):
    """The checkpoint's description (:class:`crowdexit.zoo.Spec`), by which PyTorch would build the network anew."""

    model: str
    exits: tuple[dict[str, Any], ...]
    changes: dict[str, Any]


class Manifest(_Part):
    """All that there is to know of an exported network.

    Attributes:
        library: what runs it. precision: of the stages; the exits compute in float32.
        size: (width, height) of one view. scene: of all that is looked at. view: see :class:`crowdexit.network.Config`.
        step: sides are multiples of this.
        mean, std: of the normalised picture, of 1, by channel, red first.
        classifies: whether the exits tell classes apart rather than count.
        exits: the index of the stage after which each stands, by name, in the order in which they answer.
        intervals: of the counts (:class:`crowdexit.intervals.Intervals`), or None.
        pieces: ``stage-0`` …, ``exit-NAME`` ….
        made_with: versions of the libraries that made it.
    """

    format: Literal["crowdexit-export-1"]
    library: Library
    precision: Precision
    network: NetworkPart
    size: tuple[_Side, _Side]
    scene: tuple[_Side, _Side]
    view: Literal["fit", "tiles"]
    step: int = Field(gt=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classifies: bool
    exits: dict[str, Annotated[int, Field(ge=0, lt=1000)]] = Field(min_length=1)
    intervals: dict[str, Any] | None
    pieces: dict[str, PiecePart]
    files: dict[_FileName, FilePart]
    made_with: dict[str, str]

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        stages = [stage_piece(index) for index in range(max(self.exits.values()) + 1)]
        wanted = {*stages, *map(exit_piece, self.exits)}
        if set(self.pieces) != wanted or {name for piece in self.pieces.values() for name in piece.files} != set(
            self.files
        ):
            raise ValueError("its pieces, exits and files do not belong together")
        if sum(file.bytes for file in self.files.values()) > _MOST_BYTES:
            raise ValueError("its files are too large")
        return self


def is_export(path: str | Path) -> bool:
    """Whether there is a folder with a manifest."""
    return (Path(path) / MANIFEST).is_file()


class Exported:
    """The network of an exported folder, ready to be run; a model is compiled when it is first run.

    Attributes:
        manifest: what the folder says of it.
        chain: its stages and exits between arrays.

    Raises:
        ExportError: if it is no such folder, or one of its files is missing or not what the manifest says.
        RuntimeUnavailable: if the library that runs it is not installed; when it runs, if it cannot run a model.
    """

    def __init__(self, folder: str | Path) -> None:
        self.manifest = read_manifest(Path(folder))
        contents = {name: _checked(Path(folder) / name, part) for name, part in self.manifest.files.items()}

        def model(piece: str, shapes: Shapes) -> Any:
            files = [contents[name] for name in self.manifest.pieces[piece].files]
            return files[0] if self.manifest.library == "onnx" else installed("openvino").Core().read_model(*files)

        engine: Engine
        if self.manifest.library == "onnx":
            engine = OnnxEngine(model)
        else:
            engine = OpenVINOEngine(model, half=self.manifest.precision != "fp32")
        ports = {name: Ports(piece.takes, piece.gives) for name, piece in self.manifest.pieces.items()}
        self.chain = ArrayChain(self.manifest.exits, ports, engine)

    def stream(
        self,
        picture: NDArray[np.uint8] | str | Path,
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Count a picture: each exit's name and count as soon as it is there.

        A picture much larger than ``scene`` is cut into several, as :class:`crowdexit.inference.counter.CrowdCounter`
        does, and then counted without sound.

        Args:
            picture: H×W×3 uint8 RGB, or a file.
            log_mel: (96, 64) of the second around it, or None: not heard.
            exits: names; default: all.

        Raises:
            CrowdExitError: for a network that does not count, an unknown exit, or a picture or sound of no use.
        """
        if self.manifest.classifies:
            raise ExportError(f"{self.manifest.network.model} tells classes apart; it does not count")
        for name in exits or ():
            if name not in self.chain.exit_names:
                raise ExportError(f"no exit {name!r} in this export (it has {', '.join(self.chain.exit_names)})")
        if log_mel is not None and (log_mel.shape != (96, 64) or not np.isfinite(log_mel).all()):
            raise ExportError("a log-mel has the shape (96, 64) and finite values")
        pixels = read_picture(picture) if isinstance(picture, (str, Path)) else picture
        boxes = tile_boxes(pixels.shape[1], pixels.shape[0], self.manifest.scene)
        if len(boxes) == 1:
            yield from self._walk(pixels, log_mel, exits)
            return
        sums: dict[str, float] = {}
        for x, y, w, h in boxes:
            for name, count in self._walk(pixels[y : y + h, x : x + w], None, exits):
                sums[name] = sums.get(name, 0.0) + count
        yield from sums.items()

    def count(
        self,
        picture: NDArray[np.uint8] | str | Path,
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
    ) -> dict[str, float]:
        """All counts of a picture by exit; see :meth:`stream`."""
        return dict(self.stream(picture, log_mel, exits))

    def _walk(
        self, picture: NDArray[np.uint8], log_mel: NDArray[np.float32] | None, exits: Collection[str] | None
    ) -> Iterator[tuple[str, float]]:
        for name, answer in walk(self.chain, self._record(picture, log_mel), exits):
            count = float(answer.value.sum())
            if not math.isfinite(count):
                raise ExportError(f"{self.manifest.network.model}: the exit {name} did not give a number")
            yield name, max(0.0, count)

    def _record(self, picture: NDArray[np.uint8], log_mel: NDArray[np.float32] | None) -> Record:
        """All views of a picture as a batch before the first stage."""
        laid = views(picture, self.manifest.size, self.manifest.view)
        sound = np.zeros((96, 64), np.float32) if log_mel is None else log_mel.astype(np.float32)
        return {
            "visual": np.stack([normalise(canvas) for canvas, _ in laid]),
            "log_mel": np.repeat(sound[None, None], len(laid), axis=0),
            "heard": np.full(len(laid), log_mel is not None),
            "inside": np.stack([placement.inside(self.manifest.size) for _, placement in laid])[:, None],
        }


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an exported folder.

    Raises:
        ExportError: if there is none, or it is damaged or of another version.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MOST_TEXT:
            raise ExportError(f"{path}: too long for a manifest")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ExportError(f"{folder}: no exported network ({MANIFEST}: {error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "all of it"
        raise ExportError(f"{path}: damaged, or of another version ({where}: {first['msg']})") from None
    if not (np.allclose(manifest.mean, MEAN) and np.allclose(manifest.std, STD)):
        raise ExportError(f"{path}: pictures are normalised in another way here")
    return manifest


def _checked(path: Path, part: FilePart) -> bytes:
    """The contents of a file of the folder."""
    try:
        if path.stat().st_size != part.bytes:
            raise ExportError(f"{path}: damaged (it has {path.stat().st_size} bytes, not {part.bytes})")
        contents = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(contents).hexdigest() != part.sha256:
        raise ExportError(f"{path}: damaged (its SHA-256 is not the manifest's)")
    return contents
