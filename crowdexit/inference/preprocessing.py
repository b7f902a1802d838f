"""Convert images and audio to rows for a network, and its maps back to one map of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Number
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdexit.data.audio import Warn, read_middle_second, refuse
from crowdexit.data.image import DecodedImage, from_pil, read_image
from crowdexit.data.log_mel import log_mel
from crowdexit.data.mel import AudioError, AudioInput, AudioStatus, checked_log_mel
from crowdexit.data.views import Placement, checked_image, tile_boxes, views
from crowdexit.models.backbones.audiocsrnet import STRIDE
from crowdexit.models.network import Config

ImageLike = NDArray[np.uint8] | Image.Image | DecodedImage | str | Path
AudioLike = tuple[Any, Any] | NDArray[np.float32] | AudioInput | str | Path
Box = tuple[int, int, int, int]  # x, y, width, height
# A row before collation: canvas (h, w, 3), placement of the image on it, log-mel.
Row = tuple[NDArray[np.uint8], Placement, NDArray[np.float32] | None]


@dataclass(frozen=True)
class Scene:
    """Description of a prepared image.

    Attributes:
        size: (width, height) in pixels.
        audio: whether it is counted with audio, or why not.
        rows: for each of its rows, the rectangle of the image, and its placement on the network's canvas.
        warnings: of the readers, repeated in every result.
    """

    size: tuple[int, int]
    audio: AudioStatus
    rows: Sequence[tuple[Box, Placement]]
    warnings: tuple[str, ...] = ()

    @property
    def has_audio(self) -> bool:
        """Whether it is counted with audio."""
        return self.audio == "used"

    def density(self, maps: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """One density map (h, w) of the image from those of its rows; at most 2048 cells a side if tiled.

        The sum of each tile is preserved.
        """
        parts = [(box, _without_padding(map_, at)) for map_, (box, at) in zip(maps, self.rows, strict=True)]
        if len(parts) == 1:
            return parts[0][1]
        width, height = self.size
        scale = min(1 / STRIDE, 2048 / max(width, height))
        out = np.zeros((math.ceil(height * scale), math.ceil(width * scale)), np.float32)
        for (x, y, w, h), density in parts:
            x0, y0, x1, y1 = (round(v * scale) for v in (x, y, x + w, y + h))
            x1, y1 = max(x1, x0 + 1), max(y1, y0 + 1)
            laid = cv2.resize(density, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
            mass = float(laid.sum())
            target = out[y0:y1, x0:x1]
            if mass > 0:
                target += (laid * (float(density.sum()) / mass))[: target.shape[0], : target.shape[1]]
        return out


def load_log_mel(audio: AudioLike | None, *, warn: Warn = refuse) -> NDArray[np.float32] | None:
    """Any form of audio as a log-mel (96, 64): a file, (waveform, sample rate) in either order, or a log-mel already.

    Args:
        warn: called with each warning; default: warnings are errors.

    Raises:
        AudioError: if it cannot be read or holds no audio, or an array is not (96, 64).
    """
    if audio is None:
        return None
    if isinstance(audio, AudioInput):
        for warning in audio.warnings:
            warn(warning)
        return audio.log_mel
    if isinstance(audio, (str, Path)):
        waveform, rate = read_middle_second(audio, warn=warn)
        try:
            return log_mel(waveform, rate)
        except AudioError as error:
            raise AudioError(f"{audio}: {error}") from None
    if isinstance(audio, tuple):
        return log_mel(*_waveform_and_rate(audio), warn=warn)
    return checked_log_mel(audio)


def _waveform_and_rate(pair: tuple[Any, Any]) -> tuple[NDArray[Any], int]:
    """A waveform (samples,) or (channels, samples) and its rate, of a pair in either order.

    (sample rate, samples) is the order of ``scipy.io.wavfile`` and of Gradio, whose channels come last.
    """
    if len(pair) != 2 or isinstance(pair[0], Number) == isinstance(pair[1], Number):
        raise AudioError("audio as a pair is (waveform, sample rate) or (sample rate, waveform)")
    if not isinstance(pair[0], Number):
        return pair
    waveform = np.asarray(pair[1])
    return (waveform.T if waveform.ndim == 2 else waveform), pair[0]  # type: ignore[return-value]


def audio_input(audio: AudioLike | None) -> AudioInput:
    """Convert any form of audio to network input, with its reader's warnings.

    Raises:
        AudioError: as :func:`load_log_mel`.
    """
    if isinstance(audio, AudioInput):
        return audio
    warnings: list[str] = []
    return AudioInput(load_log_mel(audio, warn=warnings.append), warnings=tuple(warnings))


def prepared(image: ImageLike, audio: AudioLike | None, config: Config) -> tuple[Scene, list[Row]]:
    """Convert an image and audio to rows for a network of this configuration.

    An image more than four times the network's size is tiled; audio, which belongs to the whole image, is then
    dropped.

    Raises:
        CrowdExitError: for an unusable image or audio.
    """
    if isinstance(image, (str, Path)):
        image = read_image(image, partial(tile_boxes, native=config.scene))
    elif isinstance(image, Image.Image):
        image = from_pil(image)
    elif not isinstance(image, DecodedImage):
        image = DecodedImage(image)
    pixels = checked_image(image.pixels)
    given = audio_input(audio)
    mel = given.log_mel
    status: AudioStatus = given.missing if mel is None else "used"
    height, width = pixels.shape[:2]
    boxes = tile_boxes(width, height, config.scene)
    if mel is not None and len(boxes) > 1:
        mel, status = None, "tiled"
    rows = [
        (box, view)
        for box in boxes
        for view in views(pixels[box[1] : box[1] + box[3], box[0] : box[0] + box[2]], config.size, config.view)
    ]
    warnings = (*image.warnings, *given.warnings)
    scene = Scene((width, height), status, [(box, placement) for box, (_, placement) in rows], warnings)
    return scene, [(canvas, placement, mel) for _, (canvas, placement) in rows]


def photo(size: tuple[int, int]) -> bytes:
    """A JPEG to measure decoding with, of twice such a (width, height), about as complex as a photograph."""
    width, height = size
    rough = np.random.default_rng(0).integers(0, 255, (max(1, height // 4), max(1, width // 4), 3), np.uint8)
    _, data = cv2.imencode(".jpg", cv2.resize(rough, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC))
    return data.tobytes()


def _without_padding(density: NDArray[np.float32], placement: Placement) -> NDArray[np.float32]:
    """The cells of a canvas' density map that the image covers."""
    (x, y), (w, h) = placement.offset, placement.size
    return density[y // STRIDE : -(-(y + h) // STRIDE), x // STRIDE : -(-(x + w) // STRIDE)]
