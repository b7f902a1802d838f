"""Makes small videos whose frames and audio are known."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray


def grey(index: int) -> int:
    """The brightness of a made video's frame, by which it is known again."""
    return 10 + 6 * (index % 40)


def index_of(image: NDArray[np.uint8]) -> int:
    """Which frame of a made video this is, of the first forty."""
    return round((float(image.mean()) - 10) / 6)


def make_video(
    path: Path,
    times: Sequence[float],
    *,
    audio: NDArray[np.float32] | None = None,
    rate: int = 16_000,
    audio_start: float = 0.0,
    size: tuple[int, int] = (96, 64),
    rotation: int = 0,
    codec: str = "libx264",
    audio_codec: str = "aac",
    left_dark: bool = False,
    key_every: int = 250,
) -> Path:
    """Write a video of grey frames at these times, with a sound (samples,) that begins at ``audio_start``."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=10)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        video.codec_context.gop_size = key_every
        if rotation:
            video.set_display_rotation(rotation)
        if audio is not None:
            audio_stream = container.add_stream(audio_codec, rate=rate, layout="mono")
        for index, time in enumerate(times):
            image = np.full((size[1], size[0], 3), grey(index), np.uint8)
            if left_dark:
                image[:, : size[0] // 2] = 0
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            format = "s16" if audio_codec == "pcm_s16le" else "fltp"
            samples = (audio * 32767).astype(np.int16) if format == "s16" else audio.astype(np.float32)
            block = av.AudioFrame.from_ndarray(samples[None], format=format, layout="mono")
            block.sample_rate, block.pts, block.time_base = rate, round(audio_start * rate), Fraction(1, rate)
            container.mux(audio_stream.encode(block))
            container.mux(audio_stream.encode())
    return path


def tone(seconds: float, *, begin: float = 0.0, end: float | None = None, rate: int = 16_000) -> NDArray[np.float32]:
    """A sound of that length, a tone of 440 Hz between two times and silence elsewhere."""
    time = np.arange(round(seconds * rate)) / rate
    on = (time >= begin) & (time < (seconds if end is None else end))
    return (0.5 * np.sin(2 * np.pi * 440 * time) * on).astype(np.float32)


def moving(index: int, size: tuple[int, int] = (96, 64)) -> NDArray[np.uint8]:
    """A frame of soft shapes that move by a pixel from one index to the next."""
    at = index % 200
    return np.ascontiguousarray(_shapes(size)[at : at + size[1], at : at + size[0]])


@cache
def _shapes(size: tuple[int, int]) -> NDArray[np.uint8]:
    ground = np.random.default_rng(0).integers(0, 255, (size[1] // 8 + 40, size[0] // 8 + 40, 3), np.uint8)
    return np.asarray(cv2.resize(ground, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC), np.uint8)


def write_moving(
    path: Path | str,
    frames: int,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    key_every: int = 25,
    size: tuple[int, int] = (96, 64),
    rate: int = 25,
    format: str | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """Write a video of :func:`moving` frames, with three frames between two others where the codec has them."""
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        video = container.add_stream(codec, rate=rate, options=options or {})
        video.codec_context.thread_count = 2  # as on two cores: what damage does depends on how the frames were divided
        video.width, video.height, video.pix_fmt = *size, pixels
        video.codec_context.gop_size = key_every
        if codec in ("libx264", "mpeg4", "mpeg2video"):
            video.codec_context.max_b_frames = 3
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(moving(index, size), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, rate)
            container.mux(video.encode(frame))
        container.mux(video.encode())


def write_audio_only(path: Path) -> None:
    """A file with a second of audio and no frame."""
    with av.open(str(path), "w") as container:
        audio = container.add_stream("aac", rate=16_000, layout="mono")
        block = av.AudioFrame.from_ndarray(tone(1)[None], format="fltp", layout="mono")
        block.sample_rate = 16_000
        container.mux(audio.encode(block))
        container.mux(audio.encode())


class Wrapped:
    """An open container; who inherits has it do something in another way."""

    def __init__(self, container: Any) -> None:
        self.container = container

    def __enter__(self) -> Wrapped:
        return self

    def __exit__(self, *arguments: object) -> None:
        self.container.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.container, name)
