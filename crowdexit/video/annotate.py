"""Frames written as a video, with the audio that belongs to them."""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.mel import AudioError
from crowdexit.errors import CrowdExitError
from crowdexit.utils.files import write_problem
from crowdexit.video.audio import audio_blocks
from crowdexit.video.frames import Frame

_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_LONGEST_SIDE = 1920
# Of at most ten seconds, each written out when it is whole.
_PIECES = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "10000000", "flush_packets": "1"}


class VideoWriteError(CrowdExitError):
    """A video that cannot be written."""


def _write_error(path: Path, error: Exception) -> VideoWriteError:
    number = getattr(error, "errno", None)
    if isinstance(number, int) and number > 0:  # FFmpeg's own numbers are negative
        return VideoWriteError(write_problem(path, OSError(number, os.strerror(number))))
    return VideoWriteError(f"{path}: cannot be written ({error})")


class AnnotatedVideo:
    """Writes frames with the audio that belongs to them as an MP4 (H.264, AAC in mono).

    It begins with the first frame. The file appears under its name when all is written; on an error nothing is left.

    Args:
        path: ends in .mp4.
        audio: the file with the audio, or None.
        frame_step: seconds from one frame to the next, for the last one's sound.
        endless: written in pieces, so that memory does not grow; what a kill leaves beside can be played.
    """

    def __init__(self, path: Path, audio: Path | None, frame_step: float, *, endless: bool = False) -> None:
        self.path, self._part = path, path.with_name(path.name + ".part")
        self._audio_path, self._frame_step = audio, frame_step
        self._begins = self._time = 0.0  # of the first frame and the last one, by their frames
        self._audio_blocks: Generator[tuple[int, NDArray[np.float32], int], None, None] | None = None
        self._written = 0
        self._video: Any = None
        self._audio_stream: Any = None
        options = _PIECES if endless else {"movflags": "faststart"}
        try:
            self._part.touch()  # PyAV opens it with the first frame only; this says at once that it cannot be
            self._container = av.open(str(self._part.absolute()), "w", format="mp4", options=options)
        except (av.FFmpegError, OSError, ValueError) as error:
            with suppress(OSError):
                self._part.unlink(missing_ok=True)
            raise _write_error(path, error) from None

    def __enter__(self) -> AnnotatedVideo:
        return self

    def add(self, image: NDArray[np.uint8], frame: Frame) -> None:
        """Write a frame H×W×3 (of the first one's size) at the time of a frame."""
        try:
            if self._video is None:
                self._begin(image, frame)
            self._time = frame.time_s
            size = (self._video.width, self._video.height)
            if image.shape[1::-1] != size:
                image = np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
            encoded = av.VideoFrame.from_ndarray(image, format="rgb24")
            encoded.pts, encoded.time_base = round((self._time - self._begins) * 1000), Fraction(1, 1000)
            self._container.mux(self._video.encode(encoded))
            self._write_audio_until(self._time)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise _write_error(self.path, error) from None

    def _begin(self, image: NDArray[np.uint8], frame: Frame) -> None:
        self._begins = frame.time_s
        height, width = image.shape[:2]
        scale = min(1.0, _LONGEST_SIDE / max(width, height))
        options = {"crf": "23", "preset": "veryfast"}
        self._video = self._container.add_stream("libx264", rate=max(1, round(1 / self._frame_step)), options=options)
        # The colours of H.264 come in blocks of 2×2.
        self._video.width, self._video.height = (max(2, round(side * scale) // 2 * 2) for side in (width, height))
        self._video.pix_fmt = "yuv420p"
        self._video.codec_context.time_base = Fraction(1, 1000)
        if self._audio_path is None:
            return
        try:
            self._audio_blocks = audio_blocks(
                self._audio_path, frame.audio_begins_s, lambda line: None, rates=_AAC_RATES
            )
            first = next(self._audio_blocks, None)
        except AudioError:  # reading the frames has said so already
            first = None
        if first is None:
            self._audio_blocks = None
            return
        self._next_block: tuple[int, NDArray[np.float32], int] | None = first
        self._audio_stream = self._container.add_stream("aac", rate=first[2], layout="mono")

    def _write_audio_until(self, time: float) -> None:
        """Write the audio up to a frame's time, gaps as silence."""
        while self._audio_blocks is not None and self._next_block is not None:
            start, samples, rate = self._next_block
            if start > time * rate:
                return
            start -= round(self._begins * rate)
            samples = samples[max(0, self._written - start) :]  # begun before the first frame, or twice there
            while self._written < start:
                self._write_audio(np.zeros(min(rate, start - self._written), np.float32), rate)
            if len(samples):
                self._write_audio(samples, rate)
            self._next_block = next(self._audio_blocks, None)

    def _write_audio(self, samples: NDArray[np.float32], rate: int) -> None:
        block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = rate, self._written, Fraction(1, rate)
        self._container.mux(self._audio_stream.encode(block))
        self._written += len(samples)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._video is not None:
                self._write_audio_until(self._time + self._frame_step)
                self._container.mux(self._video.encode())
                if self._audio_stream is not None:
                    self._container.mux(self._audio_stream.encode())
                self._container.close()
                self._part.replace(self.path)
        except (av.FFmpegError, OSError, ValueError) as failure:
            raise _write_error(self.path, failure) from None
        finally:
            with suppress(av.FFmpegError, OSError, ValueError):
                self._container.close()
            if self._audio_blocks is not None:
                self._audio_blocks.close()
            self._part.unlink(missing_ok=True)
