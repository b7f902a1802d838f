"""Convert images and audio in any form to rows for a network."""

from __future__ import annotations

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
from crowdexit.data.scene import ImageInfo
from crowdexit.data.views import Placement, checked_image, image_rows, is_tiled, tile_boxes
from crowdexit.models.network import Config

ImageLike = NDArray[np.uint8] | Image.Image | DecodedImage | str | Path
AudioLike = tuple[Any, Any] | NDArray[np.float32] | AudioInput | str | Path
# A row of a network's batch before it is laid out: canvas (h, w, 3), how the image lies there, log-mel.
Row = tuple[NDArray[np.uint8], Placement, NDArray[np.float32] | None]


def load_log_mel(audio: AudioLike | None, *, warn: Warn = refuse) -> NDArray[np.float32] | None:
    """Any form of audio as a log-mel (96, 64): a file, (waveform, sample rate) in either order, or a log-mel already.

    Args:
        warn: is called with one line about what was read; default: that is an error.

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
    """Any form of audio as a network takes it, with what its reader had to say.

    Raises:
        AudioError: as :func:`load_log_mel`.
    """
    if isinstance(audio, AudioInput):
        return audio
    warnings: list[str] = []
    return AudioInput(load_log_mel(audio, warn=warnings.append), warnings=tuple(warnings))


def prepared(image: ImageLike, audio: AudioLike | None, config: Config) -> tuple[ImageInfo, list[Row]]:
    """An image and a sound as rows for a network of this configuration.

    An image more than four times the network's scene is cut into tiles; the audio belongs to all of it and is then
    left out.

    Raises:
        CrowdExitError: for an image or a sound that cannot be used.
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
    rows = image_rows(pixels, config.scene, config.size, config.view)
    if mel is not None and is_tiled(rows):
        mel, status = None, "tiled"
    warnings = (*image.warnings, *given.warnings)
    info = ImageInfo((width, height), status, [(box, placement) for box, (_, placement) in rows], warnings)
    return info, [(canvas, placement, mel) for _, (canvas, placement) in rows]


def photo(size: tuple[int, int]) -> bytes:
    """A JPEG to measure with, about as hard to decode as a photograph, of twice such a (width, height)."""
    width, height = size
    rough = np.random.default_rng(0).integers(0, 255, (max(1, height // 4), max(1, width // 4), 3), np.uint8)
    _, data = cv2.imencode(".jpg", cv2.resize(rough, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC))
    return data.tobytes()
