"""Video in and out: frames by their time stamps, each with the second of sound around it, counted one by one."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.log_mel import AudioError
from crowdexit.data.picture import MAX_PIXELS, PictureError
from crowdexit.errors import CrowdExitError
from crowdexit.inference.counter import CountResult, CrowdCounter, Late
from crowdexit.inference.policies import ANYTIME
from crowdexit.inference.walk import Policy

DEFAULT_FPS = 1.0
# Less of a frame's second than this, and the frame is not heard: half a second, as at a video's first and
# last frame, less the tenth of it by which encoders shift a sound's beginning.
LEAST_HEARD_S = 0.45
_ROUNDING_S = 0.001  # time stamps in Matroska are whole milliseconds
_JITTER_S = 0.02  # by which sound's time stamps may be off without a gap in the sound
_AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_LONGEST_SIDE = 1920  # of an annotated video

Warn = Callable[[str], None]


class VideoError(CrowdExitError):
    """A video that cannot be read."""


class VideoWriteError(CrowdExitError):
    """A video that cannot be written."""


@dataclass(frozen=True)
class Frame:
    """A picture of a video, and its sound.

    Attributes:
        index: among all frames of the video, from 0.
        time_s: seconds since the video's first frame.
        picture: H×W×3 uint8, RGB, upright.
        sound: mono samples from half a second before the frame to half a second after it, zeros where there
            are none, and their rate in Hz; None where too little is heard.
        sound_begins_s: the video's first frame on the clock of the file that the sound is in; None: the
            sound is from another file, which begins with the first frame.
    """

    index: int
    time_s: float
    picture: NDArray[np.uint8]
    sound: tuple[NDArray[np.float32], int] | None
    sound_begins_s: float | None


@dataclass(frozen=True)
class FrameRow:
    """A counted frame (DESIGN.md, section 4)."""

    source: str
    frame: int
    time_s: float
    count: float
    chosen_exit: str
    latency_ms: float

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: times to a millisecond, counts and latencies to a hundredth."""
        return asdict(self) | {
            "time_s": round(self.time_s, 3),
            "count": round(self.count, 2),
            "latency_ms": round(self.latency_ms, 2),
        }


def count_video(
    counter: CrowdCounter,
    path: Path,
    *,
    fps: float | None = None,
    audio: Path | None = None,
    exit: str = "auto",
    deadline_ms: float | None = None,
    late: Late = "wait",
    policy: Policy = ANYTIME,
    warn: Warn = warnings.warn,
    show: Callable[[Frame, CountResult], None] | None = None,
) -> Iterator[FrameRow]:
    """Count a video frame by frame, in memory that does not depend on its length.

    Args:
        fps, audio, warn: as of :func:`read_frames`.
        exit, deadline_ms, late, policy: for each frame, as of :meth:`CrowdCounter.count`.
        show: is called with every counted frame and all that was said of it.

    Raises:
        CrowdExitError: as the two.
    """
    for frame in read_frames(path, fps=fps, audio=audio, warn=warn):
        try:
            result = counter.count(
                frame.picture, frame.sound, exit=exit, deadline_ms=deadline_ms, late=late, policy=policy
            )
        except PictureError as error:  # too small: it knows no name
            raise VideoError(f"{path}: {error}") from None
        if show is not None:
            show(frame, result)
        chosen = result.chosen
        yield FrameRow(str(path), frame.index, frame.time_s, chosen.count, chosen.exit, chosen.latency_ms)


def read_frames(
    path: Path, *, fps: float | None = None, audio: Path | None = None, warn: Warn = warnings.warn
) -> Iterator[Frame]:
    """Yield a video's frames with their sound, one at a time.

    Args:
        fps: how many frames a second to take, by their time stamps: the first at or after each 1/fps, so never
            more than there are. Default: one a second.
        audio: a file whose sound stands in for the video's own, beginning with the first frame.
        warn: is called with one line when the video or its sound breaks off; the frames before are good.

    A video without sound is not heard, nor are frames beyond the end of its sound.

    Raises:
        VideoError: if it cannot be read at all, or has no frames.
        AudioError: if ``audio`` cannot be read.
    """
    fps = DEFAULT_FPS if fps is None else checked_fps(fps)
    with ExitStack() as stack:
        container = stack.enter_context(_open(path, VideoError, "video"))
        stream = _pictures_of(container, path)
        usual = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        origin, time, length, due, index = 0.0, 0.0, 0.0, 0, -1
        sound: SoundTrack | None = None
        decoded = container.decode(stream)
        damage = ""
        while True:
            try:
                frame = next(decoded)
                too_large = frame.width * frame.height > MAX_PIXELS
            except StopIteration:
                break
            except (av.FFmpegError, ValueError, IndexError):
                damage = "damaged"
                break
            if too_large:
                raise VideoError(f"{path}: {frame.width}×{frame.height} is too large")
            index += 1
            stamp = frame.time
            if index == 0:
                origin = 0.0 if stamp is None else stamp
                sound = _sound_track(path, audio, origin, warn)
                if sound is not None:
                    stack.callback(sound.close)
            elif stamp is None or stamp - origin < time:  # none, or a clock that was set back
                time += usual
            else:
                time = stamp - origin
            length = time + (float(frame.duration * frame.time_base) if frame.duration else usual)
            if time < due / fps - _ROUNDING_S:
                continue
            due = math.floor((time + _ROUNDING_S) * fps) + 1
            yield Frame(
                index,
                time,
                _upright(frame),
                None if sound is None else sound.second_around(time),
                None if audio is not None else origin,
            )
        if index < 0:
            raise VideoError(f"{path}: " + ("a damaged video, no frame can be read" if damage else "no frames in it"))
        stated = _stated_length(container, stream)
        if damage or length < stated - 0.5 - usual:
            of = f" of {stated:.1f} s" if stated > length else ""
            warn(f"{path}: {damage or 'cut short'} after {length:.1f} s{of}; what comes before is counted")


def checked_fps(fps: float) -> float:
    """The number itself.

    Raises:
        VideoError: if it is no rate.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(f"{fps:g} frames a second cannot be counted")
    return fps


def expected_rows(path: Path, fps: float | None = None) -> int:
    """How many frames there will be to count as far as a video says; 0 where it does not or cannot be read."""
    try:
        with _open(path, VideoError, "video") as container:
            stream = _pictures_of(container, path)
            rate = float(stream.average_rate or stream.guessed_rate or DEFAULT_FPS)
            return math.ceil(_stated_length(container, stream) * min(fps or DEFAULT_FPS, rate))
    except CrowdExitError:
        return 0


class SoundTrack:
    """The sound of a file, asked for second by second in the order of time; holds little more than one second.

    Args:
        path: an audio or video file.
        origin: the time on the file's own clock that is asked for as zero; None: where its sound begins.
        warn: is called with one line if the sound breaks off.

    Raises:
        AudioError: if there is no sound that can be read.
    """

    def __init__(self, path: Path, origin: float | None, warn: Warn) -> None:
        self._blocks = _sound_blocks(path, origin, warn)
        self._held: deque[tuple[int, NDArray[np.float32]]] = deque()
        first = next(self._blocks, None)
        if first is None:
            raise AudioError(f"{path}: the sound track holds no samples")
        start, samples, self.rate = first
        self._held.append((start, samples))
        self._end = start + len(samples)

    def second_around(self, time: float) -> tuple[NDArray[np.float32], int] | None:
        """(samples (rate,), rate) with ``time`` in the middle, zeros where there is no sound; None if hardly any."""
        begin = round((time - 0.5) * self.rate)
        end = begin + self.rate
        while self._end < end and (block := next(self._blocks, None)) is not None:
            start, samples, _ = block
            self._end = start + len(samples)
            self._held.append((start, samples))
            self._forget(begin)
        self._forget(begin)
        second, heard = np.zeros(self.rate, np.float32), 0
        for start, samples in self._held:
            first, last = max(start, begin), min(start + len(samples), end)
            if first < last:
                second[first - begin : last - begin] = samples[first - start : last - start]
                heard += last - first
        return (second, self.rate) if heard >= LEAST_HEARD_S * self.rate else None

    def _forget(self, begin: int) -> None:
        while self._held and self._held[0][0] + len(self._held[0][1]) <= begin:
            self._held.popleft()

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()


class AnnotatedVideo:
    """Writes pictures with the sound that belongs to them as an MP4 (H.264, AAC in mono).

    The file appears under its name when all is written; on an error nothing is left.

    Args:
        path: ends in .mp4.
        sound: the file with the sound, or None.
        usual: seconds from one picture to the next, for the last one's sound.
    """

    def __init__(self, path: Path, sound: Path | None, usual: float) -> None:
        self.path, self._part = path, path.with_name(path.name + ".part")
        self._sound_path, self._usual, self._time = sound, usual, 0.0
        self._sound: Iterator[tuple[int, NDArray[np.float32], int]] | None = None
        self._written = 0
        self._video: Any = None
        self._audio: Any = None
        try:
            self._part.touch()  # PyAV opens it with the first picture only; this says at once that it cannot be
            self._container = av.open(str(self._part.absolute()), "w", format="mp4", options={"movflags": "faststart"})
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoWriteError(f"{path}: cannot be written ({getattr(error, 'strerror', error)})") from None

    def __enter__(self) -> AnnotatedVideo:
        return self

    def add(self, picture: NDArray[np.uint8], frame: Frame) -> None:
        """Write a picture H×W×3 (of the first one's size) at the time of a frame."""
        self._time = frame.time_s
        try:
            if self._video is None:
                self._begin(picture, frame)
            size = (self._video.width, self._video.height)
            if picture.shape[1::-1] != size:
                picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
            image = av.VideoFrame.from_ndarray(picture, format="rgb24")
            image.pts, image.time_base = round(frame.time_s * 1000), Fraction(1, 1000)
            self._container.mux(self._video.encode(image))
            self._sound_until(frame.time_s)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise VideoWriteError(f"{self.path}: cannot be written ({error})") from None

    def _begin(self, picture: NDArray[np.uint8], frame: Frame) -> None:
        height, width = picture.shape[:2]
        scale = min(1.0, _LONGEST_SIDE / max(width, height))
        options = {"crf": "23", "preset": "veryfast"}
        self._video = self._container.add_stream("libx264", rate=max(1, round(1 / self._usual)), options=options)
        # The colours of H.264 come in blocks of 2×2.
        self._video.width, self._video.height = (max(2, round(side * scale) // 2 * 2) for side in (width, height))
        self._video.pix_fmt = "yuv420p"
        self._video.codec_context.time_base = Fraction(1, 1000)
        if self._sound_path is None:
            return
        try:
            self._sound = _sound_blocks(self._sound_path, frame.sound_begins_s, lambda line: None, rates=_AAC_RATES)
            first = next(self._sound, None)
        except AudioError:  # reading the frames has said so already
            first = None
        if first is None:
            self._sound = None
            return
        self._next: tuple[int, NDArray[np.float32], int] | None = first
        self._audio = self._container.add_stream("aac", rate=first[2], layout="mono")

    def _sound_until(self, time: float) -> None:
        """Write the sound up to a time, gaps as silence."""
        while self._sound is not None and self._next is not None:
            start, samples, rate = self._next
            if start > time * rate:
                return
            samples = samples[max(0, self._written - start) :]  # begun before the first frame, or twice there
            while self._written < start:
                self._write_sound(np.zeros(min(rate, start - self._written), np.float32), rate)
            if len(samples):
                self._write_sound(samples, rate)
            self._next = next(self._sound, None)

    def _write_sound(self, samples: NDArray[np.float32], rate: int) -> None:
        block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
        block.sample_rate, block.pts, block.time_base = rate, self._written, Fraction(1, rate)
        self._container.mux(self._audio.encode(block))
        self._written += len(samples)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None and self._video is not None:
                self._sound_until(self._time + self._usual)
                self._container.mux(self._video.encode())
                if self._audio is not None:
                    self._container.mux(self._audio.encode())
                self._container.close()
                self._part.replace(self.path)
                return
            self._container.close()
        except (av.FFmpegError, OSError, ValueError) as failure:
            if error is None:
                raise VideoWriteError(f"{self.path}: cannot be written ({failure})") from None
        finally:
            self._part.unlink(missing_ok=True)


def _open(path: Path, kind: type[CrowdExitError], what: str) -> Any:
    """An opened container.

    Raises:
        CrowdExitError: of that kind, if there is none.
    """
    if not path.is_file():
        raise kind(f"{path}: no such {what} file")
    try:
        # A relative name with a colon would be taken for an address.
        return av.open(str(path.absolute()), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError):
        raise kind(f"{path}: not a readable {what} file (damaged or cut short)") from None


def _pictures_of(container: Any, path: Path) -> Any:
    """The stream of moving pictures; a cover on a sound file is none."""
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.attached_pic and stream.codec_context is not None:
            stream.thread_type = "AUTO"
            return stream
    raise VideoError(f"{path}: no moving picture in it")


def _stated_length(container: Any, stream: Any) -> float:
    """Seconds that the container says the pictures last; 0 where it does not say."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    hours, *rest = stream.metadata.get("DURATION", "").split(":")  # Matroska: 00:01:30.500000000
    with suppress(ValueError):
        return int(hours) * 3600 + int(rest[0]) * 60 + float(rest[1]) if len(rest) == 2 else float(hours)
    if container.duration and not container.streams.audio:  # else it may be the sound's
        return float(container.duration / av.time_base)
    return 0.0


def _upright(frame: Any) -> NDArray[np.uint8]:
    """H×W×3 uint8, RGB, turned as its display matrix asks."""
    turns = round(frame.rotation / 90) % 4  # anticlockwise
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def _sound_track(path: Path, audio: Path | None, origin: float, warn: Warn) -> SoundTrack | None:
    if audio is not None:
        return SoundTrack(audio, None, warn)
    with _open(path, VideoError, "video") as container:
        if not container.streams.audio:
            return None
    try:
        return SoundTrack(path, origin, warn)
    except AudioError as error:
        warn(f"{error}; the video is counted without it")
        return None


def _sound_blocks(path: Path, origin: float | None, warn: Warn, rates: tuple[int, ...] | None = None) -> Any:
    """Yield a file's sound as (first sample's number from ``origin``, mono samples (n,) float32, rate).

    Args:
        rates: that will do; another is brought to the last of them.
    """
    with _open(path, AudioError, "audio") as container:
        if not container.streams.audio:
            raise AudioError(f"{path}: no sound track")
        stream = container.streams.audio[0]
        rate = stream.rate if stream.codec_context is not None else 0
        if not rate:
            raise AudioError(f"{path}: the sound track cannot be decoded")
        if rates is not None and rate not in rates:
            rate = rates[-1]
        resampler = av.AudioResampler(format="fltp", rate=rate)
        decoded = container.decode(stream)
        expected: int | None = None
        while True:
            try:
                frame = next(decoded)
                even = resampler.resample(frame)
            except StopIteration:
                return
            except (av.FFmpegError, ValueError, IndexError):
                if expected is None:
                    raise AudioError(f"{path}: not a readable sound track (damaged or cut short)") from None
                warn(f"{path}: the sound is damaged after {expected / rate:.1f} s, from there on it is not heard")
                return
            for block in even:
                samples = block.to_ndarray().mean(axis=0, dtype=np.float32)
                if origin is None:
                    origin = block.time or 0.0
                start = expected if block.time is None else round((block.time - origin) * rate)
                # Coarse time stamps would tear small holes into the sound.
                if start is None or (expected is not None and abs(start - expected) < _JITTER_S * rate):
                    start = expected or 0
                expected = start + len(samples)
                yield start, samples, rate
