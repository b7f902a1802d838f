"""Resolve named inputs to images, videos and live sources, by suffix or contents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from crowdexit.data.image import ImageError
from crowdexit.data.images.reader import OTHER_SUFFIXES, PREVIEW_SUFFIX, RAW_SUFFIXES, SUFFIXES, is_image
from crowdexit.data.mel import AudioError
from crowdexit.errors import CrowdExitError
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.jobs.messages import say
from crowdexit.video.container import VideoError, open_file
from crowdexit.video.live import Address, address_of

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"),
    *(".wmv", ".flv", ".ogv", ".3gp", ".mjpeg", ".mjpg"),
)
AUDIO_SUFFIX = ".wav"
# FFmpeg reads text as a video of its letters, and an image as a video of one frame.
_NOT_VIDEO = ("tty", "image2", "_pipe", "gif", "ico", "ass", "srt", "webvtt")
_JPEG_STREAMS = (".mjpeg", ".mjpg")

Kind = Literal["image", "video", "live"]


class SourceError(CrowdExitError):
    """An input that is missing or cannot be counted."""


@dataclass(frozen=True)
class Source:
    """One image, video or live source to count.

    Attributes:
        path: of the file; of a live source its name.
        kind: which of the three.
        audio: of an image ``x.jpg``, the file ``x.wav`` (or ``x.WAV``) next to it, if it exists.
        named: whether the user named the file itself, not its folder.
        address: of a live source.
    """

    path: Path
    kind: Kind
    audio: Path | None = None
    named: bool = True
    address: Address | None = None

    @property
    def name(self) -> str:
        """The name shown in rows."""
        return str(self.path) if self.address is None else self.address.name


def expand(inputs: Sequence[str | Path]) -> list[Source]:
    """List images, videos and folders as sources, in the given order; folders are sorted by name.

    The kind of a file is determined by its suffix, or by its contents if the suffix is unknown. Folders are not
    searched recursively; hidden files and other kinds are skipped.

    A live source is named by its address (:func:`crowdexit.video.live.address_of`).

    Raises:
        SourceError: for an input that is missing, neither image nor video, or a folder without any; for a live
            source together with others.
        VideoError: for an address of an unsupported kind.
    """
    if not inputs:
        raise SourceError("nothing to count: name an image, a video or a folder")
    sources: list[Source] = []
    for name in inputs:
        if not str(name).strip():
            raise SourceError("an input without a name; for the current folder write .")
        path = Path(name)
        if (address := address_of(str(name))) is not None:
            sources.append(Source(Path(address.name), "live", address=address))
        else:
            sources += _folder(path) if path.is_dir() else [_named(path)]
    if len(sources) > 1 and (live := next((s for s in sources if s.kind == "live"), None)):
        raise SourceError(f"{live.name}: a live source is counted alone, it has no end")
    return sources


def kind_of(path: Path) -> Kind | None:
    """Whether a file is an image or a video, by its suffix or else by its contents; None: neither."""
    suffix = path.suffix.lower()
    # Unsupported formats are refused by name when they are read.
    if suffix in SUFFIXES or suffix in RAW_SUFFIXES or suffix in OTHER_SUFFIXES or suffix == PREVIEW_SUFFIX:
        return "image"
    if suffix in VIDEO_SUFFIXES:  # FFmpeg reads each tile of a HEIC with such a name as a video
        return "image" if suffix not in _JPEG_STREAMS and is_image(path) else "video"
    if suffix == AUDIO_SUFFIX:
        return None
    if is_image(path):
        return "image"
    try:
        with open_file(path) as container:
            moving = any(not s.disposition & s.disposition.attached_pic for s in container.streams.video)
            form = container.format.name
            # FFmpeg finds a JPEG in a PDF and the like, and reads it as motion JPEG.
            embedded = form == "mjpeg" and not _begins_with(path, b"\xff\xd8")
            return "video" if moving and not embedded and not any(n in form for n in _NOT_VIDEO) else None
    except VideoError:
        return None


def _begins_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _named(path: Path) -> Source:
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if not path.is_file():
        raise SourceError(f"{path}: not a file")
    if path.stat().st_size == 0:
        raise SourceError(f"{path}: the file is empty")
    kind = kind_of(path)
    if kind is None:
        raise SourceError(f"{path}: neither an image nor a video")
    return Source(path, kind, _audio_of(path, kind, None))


def _folder(folder: Path) -> list[Source]:
    try:
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    except OSError as error:
        raise SourceError(f"{folder}: the folder cannot be read ({error.strerror})") from None
    kinds = [(path, kind_of(path)) for path in files]
    sources = [
        Source(path, kind, _audio_of(path, kind, files), named=False) for path, kind in kinds if kind is not None
    ]
    if not sources:
        raise SourceError(f"{folder}: no image or video in this folder")
    return sources


def _audio_of(path: Path, kind: Kind, beside: Sequence[Path] | None) -> Path | None:
    """The audio file of an image, ignoring the case of its suffix.

    Args:
        beside: the files of the image's folder; None: listed now.
    """
    if kind != "image":
        return None
    default = path.with_suffix(AUDIO_SUFFIX)
    if default.is_file():
        return default
    if beside is None:
        try:
            beside = sorted(path.parent.iterdir())
        except OSError:
            return None
    fits = (p for p in beside if p.stem == path.stem and p.suffix.lower() == AUDIO_SUFFIX and p.is_file())
    return next(fits, None)


def is_single(sources: Sequence[Source]) -> bool:
    """Whether the user named exactly one file or live source."""
    return len(sources) == 1 and sources[0].named


@contextmanager
def skip_unreadable(source: Source) -> Iterator[None]:
    """Skip a file of a folder that cannot be counted; one that was named itself is an error."""
    try:
        yield
    except (ImageError, VideoError, AudioError, DeadlineMissed, SourceError) as error:
        if source.named:
            raise
        say(f"skipped: {error}")
