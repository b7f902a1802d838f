"""Exported networks: read, checked and run without PyTorch.

A folder that ``crowdexit export`` wrote holds a model for every stage and every exit, OpenVINO's or ONNX, and
``manifest.json``, which says how they belong together. What is here needs NumPy, OpenCV, Pillow, pydantic and the
library that runs the models.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crowdexit.calibration.familiarity import Familiarity, sum_features
from crowdexit.calibration.intervals import Intervals
from crowdexit.data.image import DecodedImage, read_image
from crowdexit.data.mel import AudioInput, AudioStatus
from crowdexit.data.scene import ImageInfo
from crowdexit.data.views import Box, Placement, is_tiled, tile_boxes
from crowdexit.export.manifest import read_manifest
from crowdexit.export.standalone import Description, Runner
from crowdexit.results import CountResult, ExitResult
from crowdexit.runtimes.arrays import Record


class Exported:
    """The network of an exported folder, ready to be run; a model is compiled when it is first run.

    Attributes:
        manifest: what the folder says of it.
        chain: its stages and exits between arrays.
        intervals: its calibration. familiarity: its statistics of the training images, or None.

    Raises:
        ExportError: if it is no such folder, or one of its files is missing or not what the manifest says.
        RuntimeUnavailable: if the library that runs it is not installed; when it runs, if it cannot run a model.

    Examples:
        >>> exported = Exported("street-v0")
        >>> for result in exported.stream("street.jpg"):
        ...     print(f"{result.exit} {result.count:.1f}")
        V0 11.3
        final 9.5
    """

    def __init__(self, folder: str | Path) -> None:
        self.manifest = read_manifest(Path(folder))
        self.intervals = Intervals.from_dict(self.manifest.intervals)
        self.familiarity = Familiarity.from_dict(self.manifest.familiarity)
        self._runner = Runner(Path(folder), Description.of(self.manifest.model_dump(mode="json")))
        self.chain = self._runner.chain

    def stream(
        self,
        image: NDArray[np.uint8] | DecodedImage | str | Path,
        audio: NDArray[np.float32] | AudioInput | None = None,
        *,
        exits: Collection[str] | None = None,
    ) -> Iterator[ExitResult]:
        """Yield each exit's result as soon as it is there, as :meth:`crowdexit.CrowdCounter.stream` does.

        An image much larger than ``scene`` is cut into tiles, and then counted without audio.

        Args:
            image: H×W×3 uint8 RGB or H×W grey, or a file.
            audio: a log-mel (96, 64) of the second around it, or None: no audio; an
                :class:`crowdexit.data.mel.AudioInput` says why there is none.
            exits: names; default: all.

        Raises:
            CrowdExitError: for a network that does not count, an unknown exit, or an image or audio of no use.
        """
        begun = time.perf_counter()
        given = audio if isinstance(audio, AudioInput) else AudioInput(audio)
        self._runner.check(given.log_mel, exits)
        info, rows = self._prepared(image, given)
        sums: list[NDArray[np.float64]] = []

        def note_features(record: Record) -> None:
            of_rows = sum_features(record["visual"], record["valid_mask"]) if "valid_mask" in record else None
            sums.extend([] if of_rows is None else of_rows)

        note = None if self.familiarity is None else note_features
        for output in self._runner.run(rows, given.log_mel if info.has_audio else None, exits, note):
            familiar = self.familiarity.is_familiar(np.sum(sums, 0)) if self.familiarity is not None and sums else None
            name, count = output.exit, output.count
            yield ExitResult(
                name,
                count,
                self.intervals.around(name, count, has_audio=info.has_audio, familiar=familiar),
                1000 * (time.perf_counter() - begun),
                info.density(output.maps) if output.maps else None,
                info.warnings,
                "switched off" if info.has_audio and name not in self.manifest.audio_exits else info.audio,
                familiar,
            )

    def count(
        self,
        image: NDArray[np.uint8] | DecodedImage | str | Path,
        audio: NDArray[np.float32] | AudioInput | None = None,
        *,
        exits: Collection[str] | None = None,
    ) -> CountResult:
        """All results of an image, of which the last is chosen; see :meth:`stream`."""
        results = tuple(self.stream(image, audio, exits=exits))
        return CountResult(self.manifest.network.model, results[-1], results, warnings=results[-1].warnings)

    def _prepared(
        self, image: NDArray[np.uint8] | DecodedImage | str | Path, given: AudioInput
    ) -> tuple[ImageInfo, list[tuple[Box, tuple[NDArray[np.uint8], Placement]]]]:
        """What is known of an image, and its rows."""
        if isinstance(image, (str, Path)):
            image = read_image(image, partial(tile_boxes, native=self.manifest.scene))
        elif not isinstance(image, DecodedImage):
            image = DecodedImage(image)
        rows = self._runner.rows(image.pixels)
        status: AudioStatus = given.missing if given.log_mel is None else "tiled" if is_tiled(rows) else "used"
        height, width = image.pixels.shape[:2]
        placements = [(box, placement) for box, (_, placement) in rows]
        return ImageInfo((width, height), status, placements, (*image.warnings, *given.warnings)), rows
