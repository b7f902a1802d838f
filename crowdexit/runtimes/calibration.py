"""Images for runtimes: those that they are compared on, and those on which int8's ranges are measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.classes import ClassDataset, ClassStore
from crowdexit.data.image import decode_pixels, read_pixels
from crowdexit.data.log_mel import log_mel, read_audio
from crowdexit.data.store import Store
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import Features, inputs
from crowdexit.runtimes.batch import make_batch
from crowdexit.utils.paths import PACKAGE

MOST = 12  # images: more change no range by much, and all of them are in memory at once
SAMPLES = PACKAGE / "samples"


def sample() -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The street that comes with the project, H×W×3, and its log-mel (96, 64)."""
    return read_pixels(SAMPLES / "street.jpg"), log_mel(*read_audio(SAMPLES / "street-simulated.wav"))


def made_up_crowd() -> NDArray[np.uint8]:
    """The crowd that comes with the project, H×W×3."""
    return read_pixels(SAMPLES / "crowd.jpg")


def of_file(data: Path, split: str, network: MultiExitNetwork) -> Iterator[Features]:
    """Images of a prepared file, spread evenly over a split; every other one is heard if it has a sound.

    Raises:
        CrowdExitError: if the file is none for this network, or damaged.
    """
    config = network.config
    if network.classifies:
        with ClassStore(data) as classes:
            images = ClassDataset(classes, split, size=config.size)
            for number in _spread(len(images)):
                yield inputs(images[number]["image"][None])
        return
    with Store(data) as store:
        ids = store.ids(split)
        for count, number in enumerate(_spread(len(ids))):
            stored = store.read(split, ids[number])
            image = decode_pixels(stored.image.tobytes(), f"{split}/{stored.id}")
            yield make_batch(image, None if count % 2 else stored.log_mel, config)


def _spread(length: int) -> list[int]:
    return sorted({int(at) for at in np.linspace(0, length - 1, min(MOST, length))})
