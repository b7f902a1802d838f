"""The second of audio around each frame, by the time stamps of both."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.audio import (
    LOUDEST,
    Converter,
    Warn,
    full_scale,
    has_float_samples,
    peak_of,
    samples_of,
    scale_warning,
)
from crowdexit.data.media import FAULTS, MOST_FAULTS, open_media
from crowdexit.data.mel import AudioError
from crowdexit.video.container import read_only

# A frame with less audio than this has none: half a second, as at a video's first and last frame,
# less the tenth of it by which encoders shift a sound's beginning.
MIN_AUDIO_S = 0.45
_JITTER_S = 0.02  # by which sound's time stamps may be off without a gap in the audio
_LEAP_S = 1.0  # by which they may leap before one alone is not believed

Second = tuple[NDArray[np.float32], int]


class AudioWindow:
    """Buffers the latest audio, and returns the second around a time.

    Args:
        rate: of the samples, in Hz.
        held_s: seconds of audio to buffer at most.
    """

    def __init__(self, rate: int, held_s: float = float("inf")) -> None:
        self.rate, self._held_s = rate, held_s
        self._held: deque[tuple[int, NDArray[np.float32]]] = deque()
        self._end = 0

    @property
    def end(self) -> float:
        """The time until which there is sound, in seconds."""
        return self._end / self.rate

    def add(self, start: int, samples: NDArray[np.float32]) -> None:
        """Samples (n,) of which the first is number ``start``."""
        self._held.append((start, samples))
        self._end = start + len(samples)
        if self._held_s < float("inf"):
            self.forget(self.end - self._held_s)

    def forget(self, time: float) -> None:
        """Drop audio before a time."""
        begin = round(time * self.rate)
        while self._held and self._held[0][0] + len(self._held[0][1]) <= begin:
            self._held.popleft()

    def second_around(self, time: float) -> Second | None:
        """(samples (rate,), rate) with ``time`` in the middle, zeros where there is no audio; None if hardly any."""
        begin = round((time - 0.5) * self.rate)
        second, has_audio = np.zeros(self.rate, np.float32), 0
        for start, samples in self._held:
            first, last = max(start, begin), min(start + len(samples), begin + self.rate)
            if first < last:
                second[first - begin : last - begin] = samples[first - start : last - start]
                has_audio += last - first
        return (second, self.rate) if has_audio >= MIN_AUDIO_S * self.rate else None


class AudioTrack:
    """The audio of a file, read second by second in time order; buffers little more than one second.

    Args:
        path: an audio or video file.
        origin: the time in the file that counts as zero; None: the start of its audio.
        warn: called with one line if the audio is damaged or was rescaled.

    Attributes:
        warnings: the lines so far.

    Raises:
        AudioError: if there is no audio that can be read.
    """

    def __init__(self, path: Path, origin: float | None, warn: Warn) -> None:
        self.warnings: list[str] = []

        def note(line: str) -> None:
            self.warnings.append(line)
            warn(line)

        self._blocks = audio_blocks(path, origin, note)
        first = next(self._blocks, None)
        if first is None:
            raise AudioError(f"{path}: the audio track holds no samples")
        start, samples, rate = first
        self._window = AudioWindow(rate)
        self._window.add(start, samples)

    def second_around(self, time: float) -> Second | None:
        """As :meth:`AudioWindow.second_around`; reads on until the second is there."""
        while self._window.end < time + 0.5 and (block := next(self._blocks, None)) is not None:
            self._window.add(*block[:2])
            self._window.forget(time - 0.5)
        self._window.forget(time - 0.5)
        return self._window.second_around(time)

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()


class Places:
    """Says of decoded blocks of audio, one after the other, where they belong.

    A stamp that leaps far is not believed until the next block follows it. Then, ahead, there is a gap; back, the clock
    has been set anew, and the audio goes on behind what there was of it (the frames behind theirs: where one of the
    two had ended before the other, they are apart by that).

    Args:
        rate: of the blocks, in Hz.
        origin: the time on the blocks' clock that is sample 0; None: where the first one begins.
        continues: where the clock is set back; else that is left to whoever makes another of these then.
    """

    def __init__(self, rate: int, origin: float | None, *, continues: bool = True) -> None:
        self.rate, self.origin, self._goes_on = rate, origin, continues
        self.expected: int | None = None
        self._leapt: int | None = None  # where the next one begins if the last one's leap is to be believed

    def __call__(self, block: Any) -> tuple[int, NDArray[np.float32]]:
        """(number of the first sample, mono samples (n,)) of a block that :class:`Converter` made."""
        samples = samples_of(block).mean(axis=0, dtype=np.float32)
        if self.origin is None:
            self.origin = block.time or 0.0
        start = self.expected or 0
        if block.time is not None:
            start = self._believed(round((block.time - self.origin) * self.rate), len(samples))
        self.expected = start + len(samples)
        return start, samples

    def _believed(self, start: int, length: int) -> int:
        """Where a block belongs that begins there by its stamp."""
        if self.expected is None:
            return start
        leap, leapt, self._leapt = (start - self.expected) / self.rate, self._leapt, None
        if abs(leap) < _JITTER_S:  # coarse time stamps would tear small holes into the audio
            return self.expected
        if abs(leap) <= _LEAP_S:
            return start
        if leapt is None or abs(start - leapt) > _LEAP_S * self.rate:
            self._leapt = start + length
            return self.expected
        if leap > 0 or not self._goes_on:
            return start
        assert self.origin is not None
        self.origin += leap
        return self.expected


def audio_blocks(path: Path, origin: float | None, warn: Warn, rates: tuple[int, ...] | None = None) -> Any:
    """Yield a file's sound as (first sample's number from ``origin``, mono samples (n,) float32, rate).

    Args:
        rates: that will do; another is brought to the last of them.
        warn: is called with one line when something of it is damaged (what comes behind is heard again), or had to be
            rescaled (see :func:`crowdexit.data.audio.full_scale`).

    Raises:
        AudioError: if there is no audio that can be read.
    """
    with open_media(path, AudioError, "audio") as container:
        if not container.streams.audio:
            raise AudioError(f"{path}: no audio track")
        stream = container.streams.audio[0]
        rate = stream.rate if stream.codec_context is not None else 0
        if not rate:
            raise AudioError(f"{path}: the audio track cannot be decoded")
        scale = _scale_of(path, warn) if has_float_samples(stream) else 1.0
        if rates is not None and rate not in rates:
            rate = rates[-1]
        read_only(container, stream)
        convert, place, damaged = Converter(rate), Places(rate, origin), False

        def warn_of_damage() -> None:
            nonlocal damaged
            if not damaged and place.expected is not None:
                warn(f"{path}: the audio is damaged after {place.expected / rate:.1f} s; parts of it are skipped")
            damaged = True

        packets, faults = container.demux(stream), 0
        while faults <= MOST_FAULTS:
            try:
                packet = next(packets)
                faults = 0
                blocks = [even for block in packet.decode() for even in convert(block)]
            except StopIteration:
                break
            except FAULTS:
                warn_of_damage()
                faults += 1
                packets = container.demux(stream)
                continue
            for block in blocks:
                start, samples = place(block)
                if scale != 1:
                    samples /= np.float32(scale)
                if usable(samples):
                    yield start, samples, rate
                else:
                    warn_of_damage()
        if damaged and place.expected is None:
            raise AudioError(f"{path}: not a readable audio track (damaged or cut short)")


def usable(samples: NDArray[np.float32]) -> bool:
    """Whether samples are finite, and no louder than sound gets."""
    return bool((np.abs(samples) <= LOUDEST).all())


def _scale_of(path: Path, warn: Warn) -> float:
    """By what to divide the float samples of a file."""
    peak = peak_of(path)
    try:
        scale = full_scale(peak)
    except AudioError as error:
        raise AudioError(f"{path}: {error}") from None
    if scale > 1:
        warn(f"{path}: {scale_warning(peak, scale)}")
    return scale
