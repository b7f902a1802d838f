"""Audio files in, block by block, so that memory does not depend on their length."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import av
import numpy as np
from numpy.typing import NDArray

from crowdexit.data.media import FAULTS, MOST_FAULTS, open_media
from crowdexit.data.mel import AudioError
from crowdexit.utils.paths import is_file

Warn = Callable[[str], object]

LOUDEST = 4.0  # floats reach this much over ±1 by mixing and by lossy compression, and are left as they are
_QUIETEST_INTEGERS = 128.0
_FULL_SCALES = {16: 2.0**15, 24: 2.0**23, 32: 2.0**31}

_EXTENSIBLE = 0xFFFE  # WAVE_FORMAT_EXTENSIBLE

_MOST_VALUES = 2**28  # that are decoded: 46 minutes of stereo at 48 kHz
_MOST_HELD = 2**27  # float32 that are in memory at once
_FEW_VALUES = 2**23  # up to which a file is held rather than decoded twice
_LEAST_SHARE = 0.75  # of the stated length
# Formats whose header counts the samples. Others only state a bit rate, from which FFmpeg guesses a length.
_COUNTS_SAMPLES = {"flac", "mov", "matroska", "aiff", "caf", "au", "w64", "tta", "wv", "ape"}


def refuse(line: str) -> NoReturn:
    """What to do with a warning where nobody would see it: make it an error.

    Raises:
        AudioError: always.
    """
    raise AudioError(line)


def read_audio(path: str | Path, *, seconds: float = math.inf, warn: Warn = refuse) -> tuple[NDArray[np.float32], int]:
    """Read the first audio track of an audio or video file of any format that FFmpeg knows.

    Args:
        seconds: of its beginning, rounded up to samples; default: all of it.
        warn: is called with one line when samples had to be rescaled (see :func:`full_scale`) or parts are damaged;
            default: that is an error.

    Returns:
        (channels, samples) float32 in ±1, and the sample rate in Hz.

    Raises:
        AudioError: if the file is missing, empty, damaged, cut short, too long, without audio, or has values that are
            not finite.
    """
    path = Path(path)
    track = _Track(path, warn)
    blocks: list[NDArray[np.float32]] = []
    length = values = 0
    for block in track:
        wanted = math.inf if math.isinf(seconds) else math.ceil(seconds * track.rate)
        if length < wanted:
            blocks.append(block if math.isinf(wanted) else block[:, : int(wanted) - length])
            length += blocks[-1].shape[1]
            values += blocks[-1].size
        if values > _MOST_HELD:
            raise AudioError(f"{path}: too long to hold in memory; split it into shorter files")
        if length >= wanted and not track.must_be_read_to_the_end:
            break
    return track.scaled(np.concatenate(blocks, axis=1)), track.rate


def read_middle_second(path: str | Path, *, warn: Warn = refuse) -> tuple[NDArray[np.float32], int]:
    """The second in the middle of an audio file, or all of a shorter one; of a long file no more is held in memory.

    Args, returns and errors are those of :func:`read_audio`.
    """
    path = Path(path)
    track = _Track(path, warn)
    blocks: list[NDArray[np.float32]] = []
    length = values = 0
    for block in track:
        length += block.shape[1]
        values += block.size
        if values <= _FEW_VALUES:
            blocks.append(block)
        else:
            blocks.clear()
    rate = track.rate
    first = max(0, (length - rate) // 2)
    if values <= _FEW_VALUES:
        return track.scaled(np.concatenate(blocks, axis=1)[:, first : first + rate]), rate
    at = 0
    for block in _Track(path, lambda line: None):  # the same again: where the middle is was only known at the end
        if at + block.shape[1] > first:
            blocks.append(block[:, max(0, first - at) : first + rate - at])
        at += block.shape[1]
        if at >= first + rate:
            break
    return track.scaled(np.concatenate(blocks, axis=1)), rate


def full_scale(peak: float) -> float:
    """By what to divide float samples of that largest magnitude.

    Floats are meant to lie within ±1. Up to 4 they are left as they are. From 128 on they are taken for integers that
    were stored as floats: of 16 bits up to 4 · 2¹⁵, of 24 bits up to 4 · 2²³, of 32 bits up to 4 · 2³¹.

    Raises:
        AudioError: for a peak that is not finite, or that neither explains.
    """
    if not math.isfinite(peak):
        raise AudioError("it has values that are not finite")
    if peak <= LOUDEST:
        return 1.0
    scale = next((scale for scale in _FULL_SCALES.values() if peak <= LOUDEST * scale), None)
    if scale is None or peak < _QUIETEST_INTEGERS:
        raise AudioError(f"samples reach {peak:,.6g}, but floats are expected within ±1; scale them")
    return scale


def scale_warning(peak: float, scale: float) -> str:
    """What to say of samples that are divided by :func:`full_scale`."""
    bits = next(bits for bits, of in _FULL_SCALES.items() if of == scale)
    return f"samples reach {peak:,.0f}, not ±1 as floats should; they are read as {bits}-bit integers and scaled"


def has_float_samples(stream: Any) -> bool:
    """Whether the samples are stored as floats, without compression, so that they may have any scale."""
    return str(stream.codec_context.name).startswith("pcm_f")


class Converter:
    """Brings decoded blocks to float samples, packed, at one rate; the stream may change its form on the way.

    Packed, because PyAV (seen in 18.1) looks for planes behind the last one where there are eight or more.

    Args:
        rate: in Hz; None: that of the first block.
        layout: of the channels; None: that of the first block.
    """

    def __init__(self, rate: int | None = None, layout: str | None = None) -> None:
        self.rate, self._layout = rate, layout
        self._form: tuple[object, ...] | None = None
        self._resampler: Any = None

    def __call__(self, block: Any) -> list[Any]:
        form = (block.format.name, block.layout.name, block.sample_rate)
        converted = []
        if form != self._form:
            if self._resampler is not None:
                converted = self._resampler.resample(None)
            self.rate = self.rate or block.sample_rate
            self._layout = self._layout or block.layout.name
            self._resampler = av.AudioResampler(format="flt", layout=self._layout, rate=self.rate)
            self._form = form
        return [*converted, *self._resampler.resample(block)]


def samples_of(block: Any) -> NDArray[np.float32]:
    """Samples (channels, n) of a block that :class:`Converter` made."""
    return np.asarray(block.to_ndarray().reshape(-1, block.layout.nb_channels).T, np.float32)


class _Track:
    """Iterates over the first audio track of a file as blocks (channels, n) float32, all of one form.

    Attributes, once the first block is there:
        rate: in Hz.
        peak: the largest magnitude so far.
        must_be_read_to_the_end: because only then its scale, or how much of it is missing, is known.

    Raises:
        AudioError: as :func:`read_audio`.
    """

    def __init__(self, path: Path, warn: Warn) -> None:
        self.path, self._warn = path, warn
        self.rate, self.peak = 0, 0.0
        self.must_be_read_to_the_end = False

    def __iter__(self) -> Iterator[NDArray[np.float32]]:
        path, length, values, damaged = self.path, 0, 0, False
        cut = False
        if is_file(path):
            with path.open("rb") as file:
                head = file.read(4096)
            if not head:
                raise AudioError(f"{path}: an empty file")
            if kind := _misread_wav(head):
                raise AudioError(f"{path}: {kind} is not supported; save it as WAV with 16 bits")
            cut = _wav_cut_short(head, path.stat().st_size)
        with open_media(path, AudioError, "audio") as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: no audio track")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise AudioError(f"{path}: the audio track cannot be decoded")
            self.must_be_read_to_the_end = cut or has_float_samples(stream)
            counted = bool(_COUNTS_SAMPLES & set(container.format.name.split(",")))
            stated = float(stream.duration * (stream.time_base or 0)) if counted and stream.duration else 0.0
            for block in _decoded(container, stream):
                if block is None:
                    damaged = True
                    continue
                self.rate = block.sample_rate
                samples = samples_of(block)
                self._check_scale(samples)
                length += samples.shape[1]
                values += samples.size
                if values > _MOST_VALUES:
                    minutes = length / self.rate / 60
                    raise AudioError(f"{path}: longer than {minutes:.0f} minutes, too long to be read; cut it")
                if samples.size:
                    yield samples
        if not length:
            raise AudioError(
                f"{path}: not a readable audio file (damaged or cut short)"
                if damaged
                else f"{path}: the audio track holds no samples"
            )
        if cut or length < _LEAST_SHARE * stated * self.rate:
            raise AudioError(f"{path}: cut short after {length / self.rate:.2f} s")
        if damaged:
            self._warn(f"{path}: the audio is damaged; undecodable parts are skipped")

    def _check_scale(self, samples: NDArray[np.float32]) -> None:
        if samples.size:
            low, high = float(samples.min()), float(samples.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise AudioError(f"{self.path}: it has values that are not finite")
            self.peak = max(self.peak, -low, high)

    def scaled(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Samples of this track in ±1, by the peak of all that was read."""
        try:
            scale = full_scale(self.peak)
        except AudioError as error:
            raise AudioError(f"{self.path}: {error}") from None
        if scale == 1:
            return samples
        self._warn(f"{self.path}: {scale_warning(self.peak, scale)}")
        return np.asarray(samples / np.float32(scale), np.float32)


def _decoded(container: Any, stream: Any) -> Iterator[Any | None]:
    """Decoded blocks as :class:`Converter` makes them; None where something is damaged."""
    convert, packets, faults = Converter(), container.demux(stream), 0
    while faults <= MOST_FAULTS:
        try:
            packet = next(packets)
            blocks = [even for block in packet.decode() for even in convert(block)]
        except StopIteration:
            return
        except FAULTS:
            faults += 1
            packets = container.demux(stream)
            yield None
            continue
        faults = 0
        yield from blocks


def peak_of(path: Path) -> float:
    """The largest magnitude of the samples of a file, as far as it can be read."""
    track = _Track(path, lambda line: None)
    with suppress(AudioError):
        for _ in track:
            pass
    return track.peak


def _misread_wav(head: bytes) -> str | None:
    """What a WAV file is by its beginning, if it is of a kind that FFmpeg takes for another and makes noise of."""
    if head[:4] == b"RIFX":
        return "a big-endian WAV (RIFX)"
    at = head.find(b"fmt ") + 8
    tag, _, _, _, _, bits, _, valid = struct.unpack_from("<HHIIHHHH", head.ljust(at + 20), at) if at > 8 else (0,) * 8
    if head[:4] == b"RIFF" and tag == _EXTENSIBLE and 0 < valid < bits and valid % 8 == 0:
        return f"a WAV with {valid} bits in samples of {bits}"
    return None


def _wav_cut_short(head: bytes, size: int) -> bool:
    """Whether a WAV file of that size is shorter than its head says; FFmpeg plays what is left without a word."""
    stated = int.from_bytes(head[4:8], "little")
    # Programs that write into a pipe do not know the size and put the largest there.
    return head[:4] == b"RIFF" and stated < 0x7FFFF000 and size < 0.99 * stated
