"""Read a video's frames, each with the second of audio around it."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.audio import Warn
from crowdexit.data.hdr import to_sdr
from crowdexit.data.image import ImageError
from crowdexit.data.media import FAULTS
from crowdexit.data.mel import AudioError, AudioInput
from crowdexit.errors import CrowdExitError
from crowdexit.inference.preprocessing import load_log_mel
from crowdexit.video.audio import AudioTrack, Second
from crowdexit.video.container import VideoError, check_size, open_file, stated_length, video_stream
from crowdexit.video.decode import FrameSampler, Span
from crowdexit.video.display import AS_STORED, Display

_MAX_REPORTED_GAPS = 5
_UNSPECIFIED = 2  # AVCOL_SPC_UNSPECIFIED


@dataclass(frozen=True)
class Frame:
    """A frame of a video, and its audio.

    Attributes:
        index: among all frames of the video in time order, from 0.
        time_s: seconds since the video's first frame.
        decoded: as FFmpeg decoded it.
        waveform: mono samples from half a second before the frame to half a second after it, zeros where there
            are none, and their rate in Hz; None if there is too little audio.
        audio_begins_s: the time of the video's first frame in the file of the audio; None: the audio is from
            another file, which starts with the first frame, or live.
        display: how it is displayed.
        lost: (from, to) in seconds of damaged frames before this one, since the last frame.
        behind_hole: (from, to) in seconds without frames, if this one may depend on lost frames there.
        audio_unreadable: whether the audio exists but cannot be read.
        audio_warnings: about the audio, one line each.
    """

    index: int
    time_s: float
    decoded: Any
    waveform: Second | None
    audio_begins_s: float | None
    display: Display = AS_STORED
    lost: tuple[float, float] | None = None
    audio_unreadable: bool = False
    audio_warnings: tuple[str, ...] = ()
    behind_hole: tuple[float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in square pixels, upright."""
        width, height = self.display.size(self.decoded.width, self.decoded.height)
        return (height, width) if self._quarter_turns % 2 else (width, height)

    @property
    def image(self) -> NDArray[np.uint8]:
        """H×W×3 uint8, RGB, upright, in square pixels; converted at every call."""
        return self.scaled(self.size)

    @property
    def audio(self) -> AudioInput:
        """The audio as network input.

        Raises:
            AudioError: if it is unusable.
        """
        if self.waveform is None:
            return AudioInput(None, "unreadable" if self.audio_unreadable else "none", self.audio_warnings)
        return AudioInput(load_log_mel(self.waveform), warnings=self.audio_warnings)

    @property
    def loss_warning(self) -> str | None:
        """The warning about damaged frames before this one, if any."""
        if self.lost is None:
            return None
        return f"damaged from {self.lost[0]:.1f} to {self.lost[1]:.1f} s; nothing is counted there"

    @property
    def warnings(self) -> tuple[str, ...]:
        """About the frame, one line each."""
        lines = [] if self.loss_warning is None else [self.loss_warning]
        if self.behind_hole is not None:
            begin, end = self.behind_hole
            lines.append(f"no frames from {begin:.1f} to {end:.1f} s; if they were lost, this frame may be wrong")
        return (*self.display.warnings, *lines)

    def scaled(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """The frame, scaled to (width, height): H×W×3 uint8, RGB, upright; HDR is tone-mapped.

        Raises:
            ImageError: if its pixel format cannot be converted.
        """
        turns, transfer = self._quarter_turns, self.display.transfer
        width, height = reversed(size) if turns % 2 else size
        # FFmpeg scales into planes faster than into pixels, and keeps every pixel's colour rather than every other's.
        form = "rgb24" if (width, height) == (self.decoded.width, self.decoded.height) else "gbrp"
        shrinks = width <= self.decoded.width and height <= self.decoded.height
        to: dict[str, Any] = {"width": width, "height": height, "format": form}
        to["interpolation"] = "AREA" if shrinks else "BICUBIC"  # AREA blurs what grows
        if transfer is not None:
            to["format"] = "gbrp16le"
            if self.decoded.colorspace == _UNSPECIFIED:  # FFmpeg would take the matrix of SDR
                to["src_colorspace"] = "BT2020"
        try:
            try:
                rgb = self.decoded.reformat(**to).to_ndarray()
            except OSError:  # colours by a matrix that FFmpeg knows by name alone (YCgCo, ICtCp): by the usual one
                to["src_colorspace"] = "ITU709" if transfer is None else "BT2020"
                rgb = self.decoded.reformat(**to).to_ndarray()
        except (*FAULTS, OSError) as error:
            raise ImageError(f"a frame that cannot be converted ({error})") from None
        if transfer is not None:
            rgb = to_sdr(rgb, transfer, self.display.primaries)
        return np.ascontiguousarray(np.rot90(rgb, turns))

    @property
    def _quarter_turns(self) -> int:
        out: int = round(self.decoded.rotation / 90) % 4  # anticlockwise, as the display matrix asks
        return out


def read_frames(
    path: Path, span: Span | None = None, *, audio: Path | None = None, warn: Warn = warnings.warn
) -> Iterator[Frame]:
    """Yield a video's frames with their audio, one at a time, in memory that does not depend on its length.

    Args:
        span: which frames; default: one a second. A frame does not depend on which others are selected. Everything
            before the first one is read, but hardly any of it decoded.
        audio: a file whose audio replaces the video's own, starting with the first frame.
        warn: called with each warning about damage or truncation.

    Frames of a video without audio, or beyond the end of it, have none.

    Raises:
        VideoError: if it cannot be read at all, or has no frames.
        AudioError: if ``audio`` cannot be read.
    """
    span = span or Span()
    with ExitStack() as stack:
        images = FrameSampler(path, span)
        stack.callback(images.close)
        track: AudioTrack | None = None
        begun = unreadable = False
        for index, time, decoded, display, lost, behind_hole in images:
            if not begun:
                begun = True
                track, unreadable = _audio_track(path, audio, images.origin, warn)
                if track is not None:
                    stack.callback(track.close)
            second = None if track is None else track.second_around(time)
            begins = None if audio is not None else images.origin
            lines = () if track is None else tuple(track.warnings)
            frame = Frame(index, time, decoded, second, begins, display, lost, unreadable, lines, behind_hole)
            check_size(str(path), *frame.size)
            yield frame
        if images.length == 0:
            raise VideoError(f"{path}: no frames in it, or none that can be read")
        if not begun and span.after < 0:
            until = "on" if math.isinf(span.end) else f"to {span.end:g} s"
            warn(f"{path}: no frame is shown from {span.start:g} s {until}")
        _warn_of_gaps(images, warn)


def _merged(gaps: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Sorted intervals, with overlapping ones merged."""
    out: list[tuple[float, float]] = []
    for begin, end in sorted(gaps):
        if out and begin <= out[-1][1]:
            begin, end = out[-1][0], max(end, out.pop()[1])
        out.append((begin, end))
    return out


def _warn_of_gaps(video: FrameSampler, warn: Warn) -> None:
    """Warnings about parts of the video that could not be counted."""
    stated, length = stated_length(video.container, video.stream, video.origin), video.length
    gaps = _merged([(a, b) for a, b in video.gaps if b is not None and b > video.begins])
    rest = next((a for a, b in video.gaps if b is None), length)
    if video.lost_beginning:
        warn(f"{video.path}: damaged at its beginning; times run from the first frame that can be decoded")
    if gaps:
        spans = ", ".join(f"{a:.1f} to {b:.1f} s" for a, b in gaps[:_MAX_REPORTED_GAPS])
        more = f" and {len(gaps) - _MAX_REPORTED_GAPS} more" if len(gaps) > _MAX_REPORTED_GAPS else ""
        warn(f"{video.path}: damaged or without frames from {spans}{more}; nothing is counted there")
    cut = not video.past and rest < video.span.end and max(rest, video.stored) < stated - 0.5 - video.frame_step
    if rest < length or cut:
        how = "damaged" if rest < length else "cut short"
        warn(f"{video.path}: {how} after {rest:.1f} s of {max(stated, length):.1f} s; frames before it are counted")


def expected_rows(path: Path, span: Span | None = None) -> int:
    """Expected number of frames to count, by the video's metadata; 0 if unknown or unreadable."""
    span = span or Span()
    try:
        with open_file(path) as container:
            stream = video_stream(container, str(path))
            rate = float(stream.average_rate or stream.guessed_rate or span.fps)
            seconds = min(stated_length(container, stream), span.end) - span.start
            return max(0, math.ceil(seconds * min(span.fps, rate)))
    except CrowdExitError:
        return 0


def parse_time(text: str) -> float:
    """Seconds of ``90``, ``1:30``, ``0:01:30.5``.

    Raises:
        VideoError: if it is no time.
    """
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
        raise VideoError(f"{text!r} is no time (write seconds, mm:ss or hh:mm:ss)")
    seconds = 0.0
    for part in text.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds


def _audio_track(path: Path, audio: Path | None, origin: float, warn: Warn) -> tuple[AudioTrack | None, bool]:
    """The audio of a video, and whether it exists but cannot be read."""
    if audio is not None:
        return AudioTrack(audio, None, warn), False
    with open_file(path) as container:
        if not container.streams.audio:
            return None, False
    try:
        return AudioTrack(path, origin, warn), False
    except AudioError as error:
        warn(f"{error}; the video is counted without it")
        return None, True
