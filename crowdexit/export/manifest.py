"""The manifest of an exported folder: written, and read with distrust."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crowdexit.data.views import MEAN, STD
from crowdexit.export.standalone import MANIFEST, ExportError, manifest_checksum
from crowdexit.runtimes.arrays import FEATURE_FIELDS, OUTPUT_FIELDS, TensorSpec, exit_subgraph, stage_subgraph
from crowdexit.utils.files import atomic_write
from crowdexit.utils.paths import is_file

FORMAT = "crowdexit-export-5"
_MOST_TEXT = 2**22
_MOST_BYTES = 2**32  # of all models together
_Side = Annotated[int, Field(gt=0, le=16_384)]
# A name in the folder, never a path.
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,200}$")]

Library = Literal["openvino", "onnx"]
Precision = Literal["fp32", "bf16", "int8"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FilePart(_Part):
    """A file of the folder: its length in bytes, and the SHA-256 of what is in it."""

    bytes: int = Field(gt=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class PiecePart(_Part):
    """A stage or an exit: the files of its model (OpenVINO's has two), and its tensors in the model's order.

    Shapes are those of one sample; every array has the batch before them.
    """

    files: tuple[_FileName, ...] = Field(min_length=1, max_length=2)
    takes: tuple[TensorSpec, ...]
    gives: tuple[TensorSpec, ...]


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
        audio_exits: the names of those whose output depends on the audio.
        intervals: of the counts (:class:`crowdexit.calibration.intervals.Intervals`), or None.
        temperatures: of the classes (:class:`crowdexit.calibration.temperatures.Temperatures`), or None.
        familiarity: of the training images (:class:`crowdexit.calibration.familiarity.Familiarity`), or None.
        pieces: ``stage-0`` …, ``exit-NAME`` ….
        made_with: versions of the libraries that made it.
        checksum: of all the others (:meth:`own_checksum`); written with the file.
    """

    format: Literal["crowdexit-export-5"]
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
    audio_exits: tuple[str, ...]
    intervals: dict[str, Any] | None
    temperatures: dict[str, Any] | None
    familiarity: dict[str, Any] | None
    pieces: dict[str, PiecePart]
    files: dict[_FileName, FilePart]
    made_with: dict[str, str]
    checksum: str = ""

    def own_checksum(self) -> str:
        """The checksum of everything else in it."""
        return manifest_checksum(self.model_dump(mode="json"))

    @model_validator(mode="after")
    def _complete(self) -> Manifest:
        stages = [stage_subgraph(index) for index in range(max(self.exits.values()) + 1)]
        wanted = {*stages, *map(exit_subgraph, self.exits)}
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
        """Check that each subgraph reads only existing fields and writes known ones, in their order."""
        width, height = self.size
        shapes = {"visual": (3, height, width), "log_mel": (1, 96, 64), "valid_mask": (1, height // 8, width // 8)}
        there = {name: TensorSpec(name, "float32", shape) for name, shape in shapes.items()}
        there["has_audio"] = TensorSpec("has_audio", "bool", ())
        for index in range(stages):
            stage = self.pieces[stage_subgraph(index)]
            _check_taken(stage_subgraph(index), stage.takes, there)
            _check_order(stage_subgraph(index), stage.gives, FEATURE_FIELDS)
            there |= {spec.name: spec for spec in stage.gives}
            for name in (exit_subgraph(name) for name, after in self.exits.items() if after == index):
                _check_taken(name, self.pieces[name].takes, there)
                _check_order(name, self.pieces[name].gives, OUTPUT_FIELDS)
                if not self.pieces[name].gives or self.pieces[name].gives[0].name != "value":
                    raise ValueError(f"{name} outputs no value")


def _check_order(piece: str, specs: Sequence[TensorSpec], names: Sequence[str]) -> None:
    given = [spec.name for spec in specs]
    if given != [name for name in names if name in given]:
        raise ValueError(
            f"{piece} has the tensors {', '.join(given)}, expected some of {', '.join(names)} in that order"
        )


def _check_taken(piece: str, specs: Sequence[TensorSpec], there: Mapping[str, TensorSpec]) -> None:
    _check_order(piece, specs, FEATURE_FIELDS)
    for spec in specs:
        if there.get(spec.name) != spec:
            raise ValueError(f"{piece} takes {spec.name}, which nothing before it outputs")


def is_export(path: str | Path) -> bool:
    """Whether there is a folder with a manifest."""
    return is_file(Path(path) / MANIFEST)


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
