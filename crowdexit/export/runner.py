"""Exported stages and exits: read, checked and run without PyTorch.

    from crowdexit.export.runner import Exported

    print(Exported("street-int8").count("street.jpg"))

A folder that ``crowdexit export`` wrote holds a model for every stage and every exit, OpenVINO's or ONNX, and
``manifest.json``, which says how they belong together. What is here needs numpy, OpenCV, Pillow, pydantic and the
library that runs the models.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crowdexit.data.image import (
    MEAN,
    PIXELS_ABREAST,
    PIXELS_AT_ONCE,
    PIXELS_OF_TILES_AT_ONCE,
    STD,
    Placement,
    checked_image,
    normalise,
    read_pixels,
    same_size_groups,
    tile_boxes,
    views,
)
from crowdexit.data.mel import checked_log_mel
from crowdexit.errors import CrowdExitError
from crowdexit.models.chain import iter_outputs
from crowdexit.runtimes.arrays import (
    FEATURE_FIELDS,
    OUTPUT_FIELDS,
    ArrayChain,
    Port,
    Ports,
    Record,
    exit_piece,
    stage_piece,
)
from crowdexit.runtimes.engines import Engine, OnnxEngine, OpenVINOEngine, Shapes, openvino_core
from crowdexit.utils.files import atomic_write, checksum
from crowdexit.utils.paths import is_file

MANIFEST = "manifest.json"
FORMAT = "crowdexit-export-4"
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
    """The checkpoint's description (:class:`crowdexit.models.zoo.Spec`), by which PyTorch would build the network."""

    model: str
    exits: tuple[dict[str, Any], ...]
    changes: dict[str, Any]


class Manifest(_Part):
    """All that there is to know of an exported network.

    Attributes:
        library: what runs it. precision: of the stages and of exits on maps; exits on tokens compute in float32.
        size: (width, height) of one view. scene: of all that is looked at. view: as of its ``Config``.
        step: sides are multiples of this.
        mean, std: of the normalised image, of 1, by channel, red first.
        classifies: whether the exits tell classes apart rather than count.
        exits: the index of the stage after which each stands, by name, in the order in which they answer.
        intervals: of the counts (:class:`crowdexit.calibration.intervals.Intervals`), or None.
        temperatures: of the classes (:class:`crowdexit.calibration.temperatures.Temperatures`), or None.
        familiarity: of the training images (:class:`crowdexit.calibration.familiarity.Familiarity`), or None.
        pieces: ``stage-0`` …, ``exit-NAME`` ….
        made_with: versions of the libraries that made it.
        checksum: of all the others (:meth:`own_checksum`); written with the file.
    """

    format: Literal["crowdexit-export-4"]
    library: Library
    precision: Precision
    network: NetworkPart
    size: tuple[_Side, _Side]
    scene: tuple[_Side, _Side]
    view: Literal["fit", "tiles", "scale"]
    step: int = Field(gt=0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    classifies: bool
    exits: dict[str, Annotated[int, Field(ge=0, lt=1000)]] = Field(min_length=1)
    intervals: dict[str, Any] | None
    temperatures: dict[str, Any] | None
    familiarity: dict[str, Any] | None
    pieces: dict[str, PiecePart]
    files: dict[_FileName, FilePart]
    made_with: dict[str, str]
    checksum: str = ""

    def own_checksum(self) -> str:
        """The checksum of everything else in it."""
        return checksum(json.dumps(self.model_dump(mode="json", exclude={"checksum"}), sort_keys=True).encode())

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        stages = [stage_piece(index) for index in range(max(self.exits.values()) + 1)]
        wanted = {*stages, *map(exit_piece, self.exits)}
        if set(self.pieces) != wanted or {name for piece in self.pieces.values() for name in piece.files} != set(
            self.files
        ):
            raise ValueError("its pieces, exits and files do not belong together")
        if list(self.exits.values()) != sorted(self.exits.values()):
            raise ValueError("its exits are not in the order in which they answer")
        self._check_ports(len(stages))
        if sum(file.bytes for file in self.files.values()) > _MOST_BYTES:
            raise ValueError("its files are too large")
        return self

    def _check_ports(self, stages: int) -> None:
        """Every piece takes what is there by then, and gives what there is a place for, in the fields' order."""
        width, height = self.size
        shapes = {"visual": (3, height, width), "log_mel": (1, 96, 64), "valid_mask": (1, height // 8, width // 8)}
        there = {name: Port(name, "float32", shape) for name, shape in shapes.items()}
        there["has_audio"] = Port("has_audio", "bool", ())
        for index in range(stages):
            stage = self.pieces[stage_piece(index)]
            _check_taken(stage_piece(index), stage.takes, there)
            _check_order(stage_piece(index), stage.gives, FEATURE_FIELDS)
            there |= {port.name: port for port in stage.gives}
            for name in (exit_piece(name) for name, after in self.exits.items() if after == index):
                _check_taken(name, self.pieces[name].takes, there)
                _check_order(name, self.pieces[name].gives, OUTPUT_FIELDS)
                if not self.pieces[name].gives or self.pieces[name].gives[0].name != "value":
                    raise ValueError(f"{name} gives no value")


def _check_order(piece: str, ports: Sequence[Port], names: Sequence[str]) -> None:
    given = [port.name for port in ports]
    if given != [name for name in names if name in given]:
        raise ValueError(f"{piece} has the ports {', '.join(given)}, wanted some of {', '.join(names)} in that order")


def _check_taken(piece: str, ports: Sequence[Port], there: Mapping[str, Port]) -> None:
    _check_order(piece, ports, FEATURE_FIELDS)
    for port in ports:
        if there.get(port.name) != port:
            raise ValueError(f"{piece} takes {port.name} as nothing before it gives it")


def is_export(path: str | Path) -> bool:
    """Whether there is a folder with a manifest."""
    return is_file(Path(path) / MANIFEST)


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
            return files[0] if self.manifest.library == "onnx" else openvino_core().read_model(*files)

        engine: Engine
        if self.manifest.library == "onnx":
            engine = OnnxEngine(model)
        else:
            engine = OpenVINOEngine(model, half=self.manifest.precision != "fp32")
        ports = {name: Ports(piece.takes, piece.gives) for name, piece in self.manifest.pieces.items()}
        self.chain = ArrayChain(self.manifest.exits, ports, engine)

    def stream(
        self,
        image: NDArray[np.uint8] | str | Path,
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Count a picture: each exit's name and count as soon as it is there.

        An image much larger than ``scene`` is cut into several, as :class:`crowdexit.inference.counter.CrowdCounter`
        does, and then counted without audio.

        Args:
            image: H×W×3 uint8 RGB, or a file, whose reader's warnings go to the log.
            log_mel: (96, 64) of the second around it, or None: not heard.
            exits: names; default: all.

        Raises:
            CrowdExitError: for a network that does not count, an unknown exit, or an image or audio of no use.
        """
        if self.manifest.classifies:
            raise ExportError(f"{self.manifest.network.model} tells classes apart; it does not count")
        for name in exits or ():
            if name not in self.chain.exit_names:
                raise ExportError(f"no exit {name!r} in this export (it has {', '.join(self.chain.exit_names)})")
        if exits is not None and not exits:
            raise ExportError("no exit is asked")
        if log_mel is not None:
            log_mel = checked_log_mel(log_mel)
        if isinstance(image, (str, Path)):
            image = read_pixels(image, partial(tile_boxes, native=self.manifest.scene))
        pixels = checked_image(image)
        boxes = tile_boxes(pixels.shape[1], pixels.shape[0], self.manifest.scene)
        canvases = [
            view
            for x, y, w, h in boxes
            for view in views(pixels[y : y + h, x : x + w], self.manifest.size, self.manifest.view)
        ]
        audio = log_mel if len(boxes) == 1 else None
        wanted = self.chain.exit_names if exits is None else exits
        width, height = self.manifest.size
        at_once, tiles, abreast = (
            max(1, most // (width * height)) for most in (PIXELS_AT_ONCE, PIXELS_OF_TILES_AT_ONCE, PIXELS_ABREAST)
        )
        if len(boxes) > 1:
            at_once = min(at_once, tiles)
        # An image of an absurd shape has too many boxes to go through the network abreast: the last of them tell.
        counts = dict.fromkeys(wanted, 0.0)
        for start in range(0, len(canvases), abreast):
            batches = (
                self._record(rows, audio) for rows in same_size_groups(canvases[start : start + abreast], at_once)
            )
            for name, count in iter_outputs(_Abreast(self.chain), batches, wanted):
                counts[name] += count
                if start + abreast >= len(canvases):
                    yield name, self._checked_count(name, counts[name])

    def count(
        self,
        image: NDArray[np.uint8] | str | Path,
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
    ) -> dict[str, float]:
        """All counts of an image by exit; see :meth:`stream`."""
        return dict(self.stream(image, log_mel, exits))

    def _checked_count(self, name: str, count: float) -> float:
        if not math.isfinite(count):
            raise ExportError(f"{self.manifest.network.model}: the exit {name} did not give a number")
        return max(0.0, count)

    def _record(
        self, canvases: Sequence[tuple[NDArray[np.uint8], Placement]], log_mel: NDArray[np.float32] | None
    ) -> Record:
        """Views on canvases of one size as a batch before the first stage."""
        height, width = canvases[0][0].shape[:2]
        audio = np.zeros((96, 64), np.float32) if log_mel is None else log_mel
        return {
            "visual": np.stack([normalise(canvas) for canvas, _ in canvases]),
            "log_mel": np.repeat(audio[None, None], len(canvases), axis=0),
            "has_audio": np.full(len(canvases), log_mel is not None),
            "valid_mask": np.stack([placement.valid_mask((width, height)) for _, placement in canvases])[:, None],
        }


class _Abreast:
    """A chain over several batches: all of them go through a stage before any goes on. What an exit says is the sum."""

    def __init__(self, chain: ArrayChain) -> None:
        self._chain = chain
        self.exit_names, self.stage_of = chain.exit_names, chain.stage_of

    def advance(self, index: int, state: Iterable[Record]) -> Iterable[Record]:
        return [self._chain.advance(index, record) for record in state]

    def run_exit(self, name: str, state: Iterable[Record]) -> float:
        return sum(float(self._chain.run_exit(name, record).value.sum()) for record in state)


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
    if manifest.checksum != manifest.own_checksum():
        raise ExportError(f"{path}: damaged (its checksum does not match)")
    if not (np.allclose(manifest.mean, MEAN) and np.allclose(manifest.std, STD)):
        raise ExportError(f"{path}: images are normalised in another way here")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put a manifest into a folder, in place of the one that may be there; whole, or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    sealed = manifest.model_copy(update={"checksum": manifest.own_checksum()})
    with atomic_write(folder / MANIFEST) as part:
        part.write_text(sealed.model_dump_json(indent=1), "utf-8")


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
