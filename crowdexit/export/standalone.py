"""What runs an exported network with NumPy, OpenCV and its engine alone; an export brings a copy of it along."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.mel import FRAMES, MEL_BANDS, checked_log_mel
from crowdexit.data.views import (
    PIXELS_IN_FLIGHT,
    PIXELS_PER_BATCH,
    TILE_PIXELS_PER_BATCH,
    Box,
    Placement,
    checked_image,
    image_rows,
    is_tiled,
    normalise,
    same_size_groups,
    tile_boxes,
)
from crowdexit.errors import CrowdExitError
from crowdexit.models.chain import iter_outputs
from crowdexit.runtimes.arrays import ArrayChain, Record, Signature, TensorSpec
from crowdexit.runtimes.engines import Engine, OnnxEngine, OpenVINOEngine, Shapes, openvino_core
from crowdexit.utils.checksum import checksum

MANIFEST = "manifest.json"


class ExportError(CrowdExitError):
    """Something that cannot be exported, or an exported folder that is damaged."""


@dataclass(frozen=True)
class Description:
    """What has to be known of an exported network to run it: a part of its manifest.

    Attributes:
        model: its name.
        library: what runs it. precision: of its stages.
        size: (width, height) of one view. scene: of the whole image. view: how an image becomes views.
        classifies: whether its exits classify rather than count.
        exits: the index of the stage after which each stands, by name, in the order in which they answer.
        pieces: the arrays of each stage and exit. models: the files of each.
        files: bytes and SHA-256 of each file.
    """

    model: str
    library: Literal["openvino", "onnx"]
    precision: Literal["fp32", "bf16", "int8"]
    size: tuple[int, int]
    scene: tuple[int, int]
    view: Literal["fit", "tiles", "scale"]
    classifies: bool
    exits: Mapping[str, int]
    pieces: Mapping[str, Signature]
    models: Mapping[str, Sequence[str]]
    files: Mapping[str, tuple[int, str]]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Description:
        """The description in a manifest's JSON, whose keys and values are taken as they are."""
        pieces = manifest["pieces"]
        return cls(
            model=manifest["network"]["model"],
            library=manifest["library"],
            precision=manifest["precision"],
            size=_pair(manifest["size"]),
            scene=_pair(manifest["scene"]),
            view=manifest["view"],
            classifies=manifest["classifies"],
            exits=manifest["exits"],
            pieces={name: Signature(_specs(piece["takes"]), _specs(piece["gives"])) for name, piece in pieces.items()},
            models={name: piece["files"] for name, piece in pieces.items()},
            files={name: (file["bytes"], file["sha256"]) for name, file in manifest["files"].items()},
        )


def read_description(folder: Path) -> Description:
    """The description of the network in a folder whose manifest nobody else has written.

    Raises:
        ExportError: if there is none, or it is damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
        if manifest["checksum"] == manifest_checksum(manifest):
            return Description.of(manifest)
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        pass
    raise ExportError(f"{path}: damaged (its checksum does not match)")


def manifest_checksum(manifest: Mapping[str, Any]) -> str:
    """The checksum of all else in a manifest's JSON."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True).encode())


@dataclass(frozen=True)
class RunnerOutput:
    """What an exit says of an image: people, and the density map of each of its rows, if the exit makes maps."""

    exit: str
    count: float
    maps: Sequence[NDArray[np.float32]]


class Runner:
    """The network of an exported folder, ready to be run on arrays; a model is compiled when it is first run.

    Attributes:
        chain: its stages and exits between arrays.

    Raises:
        ExportError: if one of its files is missing or not what the description says.
        RuntimeUnavailable: if the library that runs it is not installed; when it runs, if it cannot run a model.
    """

    def __init__(self, folder: Path, description: Description) -> None:
        self._about = description
        contents = {name: _checked(folder / name, *about) for name, about in description.files.items()}

        def model(piece: str, shapes: Shapes) -> Any:
            files = [contents[name] for name in description.models[piece]]
            return files[0] if description.library == "onnx" else openvino_core().read_model(*files)

        engine: Engine
        if description.library == "onnx":
            engine = OnnxEngine(model)
        else:
            engine = OpenVINOEngine(model, half=description.precision != "fp32")
        self.chain = ArrayChain(description.exits, description.pieces, engine)

    def check(self, log_mel: NDArray[np.float32] | None, exits: Collection[str] | None) -> None:
        """Refuse what cannot be counted with, before an image is read.

        Raises:
            CrowdExitError: for a network that does not count, an unknown exit, or a log-mel that is none.
        """
        if self._about.classifies:
            raise ExportError(f"{self._about.model} is a classifier; it does not count")
        for name in exits or ():
            if name not in self.chain.exit_names:
                raise ExportError(f"no exit {name!r} in this export (it has {', '.join(self.chain.exit_names)})")
        if exits is not None and not exits:
            raise ExportError("no exit is named")
        if log_mel is not None:
            checked_log_mel(log_mel)

    def boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """The tiles (x, y, w, h) in which an image is counted: one that has all of it, if it is not too large.

        Raises:
            CrowdExitError: if there are too many.
        """
        return tile_boxes(width, height, self._about.scene)

    def stream(
        self,
        image: NDArray[np.uint8],
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Count an image: yield each exit's name and count as soon as it is there.

        An image much larger than ``scene`` is counted in tiles, and then without audio.

        Args:
            image: H×W×3 uint8 RGB.
            log_mel: (96, 64) of the second around it, or None: no audio.
            exits: names; default: all.

        Raises:
            CrowdExitError: as :meth:`check`, or for an image of no use.
        """
        self.check(log_mel, exits)
        rows = self.rows(image)
        for output in self.run(rows, None if is_tiled(rows) else log_mel, exits):
            yield output.exit, output.count

    def rows(self, image: NDArray[np.uint8]) -> list[tuple[Box, tuple[NDArray[np.uint8], Placement]]]:
        """The rows that an image takes in a batch: see :func:`crowdexit.data.views.image_rows`."""
        return image_rows(checked_image(image), self._about.scene, self._about.size, self._about.view)

    def run(
        self,
        rows: Sequence[tuple[Box, tuple[NDArray[np.uint8], Placement]]],
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
        after_first_stage: Callable[[Record], None] | None = None,
    ) -> Iterator[RunnerOutput]:
        """Each exit's output for the rows of an image as soon as it is there.

        Args:
            after_first_stage: is called with what the first stage hands over of each batch.
        """
        canvases = [row for _, row in rows]
        wanted = self.chain.exit_names if exits is None else exits
        width, height = self._about.size
        batch, tiles, in_flight = (
            max(1, most // (width * height)) for most in (PIXELS_PER_BATCH, TILE_PIXELS_PER_BATCH, PIXELS_IN_FLIGHT)
        )
        if is_tiled(rows):
            batch = min(batch, tiles)
        # An image of an absurd shape has too many tiles to go through the network together: the counts come
        # with the last of them.
        chain = _BatchesChain(self.chain, after_first_stage)
        counts = dict.fromkeys(wanted, 0.0)
        maps: dict[str, list[NDArray[np.float32]]] = {name: [] for name in wanted}
        for start in range(0, len(canvases), in_flight):
            batches = (
                _record(group, log_mel) for group in same_size_groups(canvases[start : start + in_flight], batch)
            )
            for name, (count, density) in iter_outputs(chain, batches, wanted):
                counts[name] += count
                maps[name] += density
                if start + in_flight >= len(canvases):
                    yield RunnerOutput(name, self._checked_count(name, counts[name]), maps[name])

    def _checked_count(self, name: str, count: float) -> float:
        if not math.isfinite(count):
            raise ExportError(f"{self._about.model}: exit {name} did not return a number")
        return max(0.0, count)


def _record(rows: Sequence[tuple[NDArray[np.uint8], Placement]], log_mel: NDArray[np.float32] | None) -> Record:
    """Views on canvases of one size as a batch before the first stage."""
    height, width = rows[0][0].shape[:2]
    audio = np.zeros((FRAMES, MEL_BANDS), np.float32) if log_mel is None else checked_log_mel(log_mel)
    return {
        "visual": np.stack([normalise(canvas) for canvas, _ in rows]),
        "log_mel": np.repeat(audio[None, None], len(rows), axis=0),
        "has_audio": np.full(len(rows), log_mel is not None),
        "valid_mask": np.stack([placement.valid_mask((width, height)) for _, placement in rows])[:, None],
    }


class _BatchesChain:
    """A chain over several batches: all of them go through a stage before any goes on.

    An exit's output is the sum of the counts, and the density map of each row.
    """

    def __init__(self, chain: ArrayChain, after_first_stage: Callable[[Record], None] | None) -> None:
        self._chain, self._after_first_stage = chain, after_first_stage
        self.exit_names, self.stage_of = chain.exit_names, chain.stage_of

    def advance(self, index: int, state: Iterable[Record]) -> Iterable[Record]:
        advanced = []
        for record in state:
            advanced.append(self._chain.advance(index, record))
            if index == 0 and self._after_first_stage is not None:
                self._after_first_stage(advanced[-1])
        return advanced

    def run_exit(self, name: str, state: Iterable[Record]) -> tuple[float, list[NDArray[np.float32]]]:
        outputs = [self._chain.run_exit(name, record) for record in state]
        maps = [density for output in outputs if output.density is not None for density in output.density[:, 0]]
        return sum(float(output.value.sum()) for output in outputs), maps


def _pair(values: Sequence[int]) -> tuple[int, int]:
    width, height = values
    return width, height


def _specs(specs: Sequence[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(spec["name"], spec["dtype"], tuple(spec["shape"])) for spec in specs)


def _checked(path: Path, size: int, sha256: str) -> bytes:
    """The contents of a file of the folder."""
    try:
        if path.stat().st_size != size:
            raise ExportError(f"{path}: damaged (it has {path.stat().st_size} bytes, not {size})")
        contents = path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise ExportError(f"{path}: damaged (its SHA-256 is not the manifest's)")
    return contents
