"""What a video's container says: its frames, their size and shape, and how long they last."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import av
from av.stream import Discard

from crowdexit.data.image import MAX_PIXELS
from crowdexit.data.media import open_media
from crowdexit.errors import CrowdExitError


class VideoError(CrowdExitError):
    """A video that cannot be read."""


class TooLarge(VideoError):
    """Frames that do not fit into memory."""


def open_file(path: Path) -> Any:
    """A video's opened container.

    Raises:
        VideoError: if there is none.
    """
    return open_media(path, VideoError, "video")


def video_stream(container: Any, name: str, threads: str = "AUTO") -> Any:
    """The stream of moving frames, the only one that is read; a cover on a sound file is none.

    Args:
        threads: how it is decoded abreast, in FFmpeg's words.

    Raises:
        VideoError: if there is none; TooLarge: if its frames are.
    """
    for stream in container.streams.video:
        if not stream.disposition & stream.disposition.attached_pic and stream.codec_context is not None:
            stream.codec_context.thread_type = threads
            check_size(name, stream.width, stream.height)
            return stream
    raise VideoError(f"{name}: no moving frame in it")


def check_size(name: str, width: int, height: int) -> None:
    """See that a frame of that size fits into memory.

    Raises:
        TooLarge: if it does not.
    """
    if width * height > MAX_PIXELS:
        raise TooLarge(f"{name}: {width}×{height} is too large")


def read_only(container: Any, *streams: Any) -> None:
    """Have all other streams passed over where they stand: they need not even be read."""
    for stream in container.streams:
        if stream not in streams:
            stream.discard = Discard.all


def stated_length(container: Any, stream: Any, origin: float | None = None) -> float:
    """Seconds that the container says the frames last; 0 where it does not say.

    Args:
        origin: the first frame on the container's clock, on which Matroska states the end; None: as it says.
    """
    # Of Matroska's streams FFmpeg says how long the whole file is.
    if stream.duration and "matroska" not in container.format.name:
        return float(stream.duration * stream.time_base)
    hours, *rest = stream.metadata.get("DURATION", "").split(":")  # Matroska: 00:01:30.500000000
    with suppress(ValueError):
        end = int(hours) * 3600 + int(rest[0]) * 60 + float(rest[1]) if len(rest) == 2 else float(hours)
        begin = float((stream.start_time or 0) * stream.time_base) if origin is None else origin
        return max(0.0, end - begin)
    if container.duration and not container.streams.audio:  # else it may be the audio's
        return float(container.duration / av.time_base)
    return 0.0


def nominal_step(stream: Any) -> float:
    """Seconds from one frame to the next as a rule."""
    return 1 / float(stream.average_rate or stream.guessed_rate or 25)
