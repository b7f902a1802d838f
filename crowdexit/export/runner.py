"""Exported networks: read, checked and run without PyTorch.

A folder that ``crowdexit export`` wrote holds a model for every stage and every exit, OpenVINO's or ONNX, and
``manifest.json``, which says how they belong together. What is here needs NumPy, OpenCV, Pillow, pydantic and the
library that runs the models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.image import read_pixels
from crowdexit.data.views import tile_boxes
from crowdexit.export.manifest import read_manifest
from crowdexit.export.standalone import Description, Runner


class Exported(Runner):
    """The network of an exported folder, ready to be run; a model is compiled when it is first run.

    Attributes:
        manifest: what the folder says of it.
        chain: its stages and exits between arrays.

    Raises:
        ExportError: if it is no such folder, or one of its files is missing or not what the manifest says.
        RuntimeUnavailable: if the library that runs it is not installed; when it runs, if it cannot run a model.

    Examples:
        >>> exported = Exported("street-v0")
        >>> for name, count in exported.stream("street.jpg"):
        ...     print(f"{name} {count:.1f}")
        V0 11.3
        final 9.5
    """

    def __init__(self, folder: str | Path) -> None:
        self.manifest = read_manifest(Path(folder))
        super().__init__(Path(folder), Description.of(self.manifest.model_dump(mode="json")))

    def stream(
        self,
        image: NDArray[np.uint8] | str | Path,
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
    ) -> Iterator[tuple[str, float]]:
        """Count an image: yield each exit's name and count as soon as it is there.

        An image much larger than ``scene`` is cut into several, as :class:`crowdexit.inference.counter.CrowdCounter`
        does, and then counted without audio.

        Args:
            image: H×W×3 uint8 RGB, or a file, whose reader's warnings go to the log.
            log_mel: (96, 64) of the second around it, or None: no audio.
            exits: names; default: all.

        Raises:
            CrowdExitError: for a network that does not count, an unknown exit, or an image or audio of no use.
        """
        self.check(log_mel, exits)
        if isinstance(image, (str, Path)):
            image = read_pixels(image, partial(tile_boxes, native=self.manifest.scene))
        yield from super().stream(image, log_mel, exits)

    def count(
        self,
        image: NDArray[np.uint8] | str | Path,
        log_mel: NDArray[np.float32] | None = None,
        exits: Collection[str] | None = None,
    ) -> dict[str, float]:
        """All counts of an image by exit; see :meth:`stream`."""
        return dict(self.stream(image, log_mel, exits))
