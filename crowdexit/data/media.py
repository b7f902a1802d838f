"""Video and audio files opened with FFmpeg: nothing is read but the named file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import av
from av.format import formats_available

from crowdexit.errors import CrowdExitError
from crowdexit.utils.paths import is_file

# What FFmpeg may raise for a damaged file; PyAV adds two of Python's own.
FAULTS = (av.FFmpegError, ValueError, IndexError)
MOST_FAULTS = 100  # of reading, one after the other, without a packet in between
# Demuxers that open other files and addresses which their file names.
PLAYLISTS = {"hls", "concat", "dash", "webm_dash_manifest", "sdp", "imf"}
# Further ones that do: by a pattern in the file's name, beside it, or as a script. And devices.
_OTHERS = {"image2", "mlv", "vobsub", "rtsp", "rtp", "sap", "mpjpeg", "lavfi", "avisynth", "vapoursynth", "dvdvideo"}


def open_media(path: Path, kind: type[CrowdExitError], what: Literal["video", "audio"]) -> Any:
    """Open a media file.

    Args:
        kind: the class of the errors.
        what: how the file is called in them.

    Returns:
        The container, which the caller closes. Tags that are not UTF-8 are read with replacement characters.

    Raises:
        CrowdExitError: of that kind, if it cannot be opened, or is a playlist or the like, which names other files.
    """
    if not is_file(path):
        raise kind(f"{path}: no such {what} file")
    try:
        # FFmpeg would take a relative name with a colon for an address; an absolute one never.
        return av.open(
            str(path.absolute()),
            metadata_errors="replace",
            container_options={"protocol_whitelist": "file", "format_whitelist": _formats()},
        )
    except (*FAULTS, OSError):
        pass
    head = _head(path)
    if b"Content-Type: image/" in head and head.lstrip().startswith(b"--"):
        raise kind(
            f"{path}: JPEG images with headers between them (multipart) are not supported; convert it with FFmpeg"
        )
    if _is_playlist(head):
        raise kind(f"{path}: a list of other files, not {'a video' if what == 'video' else 'audio'}")
    raise kind(f"{path}: not a readable {what} file (damaged or cut short)")


@cache
def _formats() -> str:
    """The demuxers that may be used, as FFmpeg takes a list."""
    return ",".join(sorted(formats_available - PLAYLISTS - _OTHERS))


def _head(path: Path) -> bytes:
    """A file's first bytes, without a byte-order mark and blanks; none if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError:
        return b""


def _is_playlist(head: bytes) -> bool:
    """Whether a file that FFmpeg may not open begins like a list of other files."""
    return head.startswith((b"#EXTM3U", b"ffconcat", b"v=0")) or b"<MPD" in head
