"""Sound in: audio files read, and one second of any waveform turned into VGGish's log-mel picture."""

from __future__ import annotations

from fractions import Fraction
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from crowdexit.data.mel import FRAMES, MEL_BANDS, AudioError

SAMPLE_RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512  # samples: 25 ms and 10 ms
LOWEST_HZ, HIGHEST_HZ, LOG_OFFSET = 125.0, 7500.0, 0.01

RATES = (1_000, 1_000_000)
# The published VGGish resamples with resampy's "kaiser_best": these are that filter's parameters. Close to it, not
# equal: resampy interpolates in a table of the filter, torchaudio computes it at each tap.
_FILTER: dict[str, Any] = {
    "lowpass_filter_width": 64,
    "rolloff": 0.9475937167399596,
    "resampling_method": "sinc_interp_kaiser",
    "beta": 14.769656459379492,
}

_MOST_CHANNELS = 64
_MOST_VALUES = 2**28  # 1 GiB as float32: 46 minutes of stereo at 48 kHz
_IN_ONE_THREAD = 2**18  # multiply-adds of a product up to which OpenBLAS uses no other thread
_LEAST_SHARE = 0.75  # of the stated length; formats that only estimate theirs stay above it


def log_mel(waveform: NDArray[np.generic] | torch.Tensor, sample_rate: int) -> NDArray[np.float32]:
    """One second of sound as VGGish takes it (Hershey et al., CNN architectures for large-scale audio, 2017).

    16 kHz mono, magnitudes of a Fourier transform of 512 under periodic Hann windows of 25 ms every 10 ms
    (no centring), 64 triangular bands from 125 to 7500 Hz that are linear in HTK mel, log(mel + 0.01). A
    second gives 98 frames; the first 96 are the example, as in the published framing.

    Args:
        waveform: (samples,) or (channels, samples), floats in ±1 or integer PCM of 8, 16 or 32 bits (scaled
            to ±1, unsigned ones around their middle). Channels are averaged. Of a longer sound the middle
            second is taken, a shorter one is put in the middle of silence.
        sample_rate: Hz, 1,000 to 1,000,000.

    Returns:
        (96, 64) float32, time by frequency.

    Raises:
        AudioError: if the waveform is empty, not finite or not of this form, or the rate absurd.
    """
    rate = checked_rate(sample_rate)
    second = at_rate(_middle_second(mono(waveform), rate), rate, SAMPLE_RATE)
    second = np.pad(second, (0, max(0, SAMPLE_RATE - len(second))))[:SAMPLE_RATE]
    frames = np.lib.stride_tricks.sliding_window_view(second, WINDOW)[::HOP][:FRAMES]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    magnitudes = np.abs(np.fft.rfft(frames * window, FFT))
    return np.log(_product(magnitudes, _mel_matrix()) + LOG_OFFSET).astype(np.float32)


def read_audio(path: str | Path) -> tuple[NDArray[np.float32], int]:
    """Read the first sound track of an audio or video file of any format that FFmpeg knows.

    Returns:
        (channels, samples) float32 in ±1, and the sample rate in Hz.

    Raises:
        AudioError: if the file is missing, empty, damaged, cut short, without sound, or of absurd length.
    """
    path = Path(path)
    if not path.is_file():
        raise AudioError(f"{path}: no such audio file")
    if path.stat().st_size == 0:
        raise AudioError(f"{path}: an empty file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: no sound track")
            stream = container.streams.audio[0]
            rate, blocks, values = stream.rate, [], 0
            resampler = av.AudioResampler(format="fltp")  # only the sample format; rate and channels stay
            for frame in container.decode(stream):
                for even in resampler.resample(frame):
                    blocks.append(even.to_ndarray())
                    values += blocks[-1].size
                if values > _MOST_VALUES:
                    raise AudioError(f"{path}: too long a sound to be held in memory")
            stated = float(stream.duration * (stream.time_base or 0)) if stream.duration else 0.0
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise AudioError(f"{path}: not a readable audio file (damaged or cut short)") from error
    if not values or not rate:
        raise AudioError(f"{path}: the sound track holds no samples")
    waveform = np.concatenate(blocks, axis=1).astype(np.float32, copy=False)
    if _wav_cut_short(path) or waveform.shape[1] < _LEAST_SHARE * stated * rate:
        raise AudioError(f"{path}: cut short, {waveform.shape[1] / rate:.2f} s are left")
    return waveform, rate


def _wav_cut_short(path: Path) -> bool:
    """Whether a WAV file is shorter than its head says; FFmpeg plays what is left without a word."""
    with path.open("rb") as file:
        head = file.read(8)
    stated = int.from_bytes(head[4:], "little")
    # Programs that write into a pipe do not know the size and put the largest there.
    return head[:4] == b"RIFF" and stated < 0x7FFFF000 and path.stat().st_size < 0.99 * stated


def checked_rate(sample_rate: float) -> int:
    """A sample rate in Hz that can be worked with.

    Raises:
        AudioError: if it is not whole, or not from 1,000 to 1,000,000.
    """
    if not RATES[0] <= sample_rate <= RATES[1] or sample_rate != int(sample_rate):
        raise AudioError(f"a sample rate of {sample_rate} Hz (from {RATES[0]:,} to {RATES[1]:,} can be used)")
    return int(sample_rate)


def mono(waveform: NDArray[np.generic] | torch.Tensor) -> NDArray[np.float64]:
    """(samples,) float64 in ±1 of any waveform that :func:`log_mel` takes.

    Raises:
        AudioError: if it is empty, not finite or not of this form.
    """
    array = waveform.detach().cpu().numpy() if isinstance(waveform, torch.Tensor) else np.asarray(waveform)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > _MOST_CHANNELS):
        raise AudioError(f"a waveform of shape {array.shape}, not (samples,) or (channels, samples)")
    if array.size == 0:
        raise AudioError("a waveform without samples")
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 4:
        half = 2.0 ** (8 * array.dtype.itemsize - 1)
        scaled = array / half - (1.0 if array.dtype.kind == "u" else 0.0)
    elif array.dtype.kind == "f":
        scaled = array.astype(np.float64)
    else:
        raise AudioError(f"a waveform of {array.dtype}, not of floats or 8, 16 or 32 bit integers")
    if not np.isfinite(scaled).all():
        raise AudioError("a waveform with values that are not finite")
    return scaled if scaled.ndim == 1 else scaled.mean(axis=0)


def _middle_second(samples: NDArray[np.float64], rate: int) -> NDArray[np.float64]:
    spare = len(samples) - rate
    if spare >= 0:
        return samples[spare // 2 : spare // 2 + rate]
    return np.pad(samples, (-spare // 2, -spare - -spare // 2))


def at_rate(samples: NDArray[np.float64], rate: int, wanted: int) -> NDArray[np.float64]:
    """Samples (n,) at ``rate`` Hz, resampled to ``wanted`` Hz: about n · wanted / rate of them."""
    if rate == wanted:
        return samples
    # A rate with no large common divisor (44,101 Hz) would ask for a filter of gigabytes. The nearest simple
    # ratio is exact for every usual rate and off by less than a ten thousandth for the rest.
    ratio = Fraction(wanted, rate).limit_denominator(1000)
    matrix, lead, hop = _resampling(ratio)
    length = -(-len(samples) * ratio.numerator // ratio.denominator)
    windows = -(-length // matrix.shape[1])
    padded = np.pad(samples, (lead, max(0, (windows - 1) * hop + len(matrix) - lead - len(samples))))
    return _product(np.lib.stride_tricks.sliding_window_view(padded, len(matrix))[::hop], matrix).ravel()[:length]


def _product(rows: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """``rows @ matrix``, a few rows at a time, so that OpenBLAS stays in this thread.

    Its other threads would spin for longer than they compute, on cores that the network is using.
    """
    few = max(1, _IN_ONE_THREAD // matrix.size)
    return np.concatenate([rows[first : first + few] @ matrix for first in range(0, len(rows), few)])


@lru_cache(maxsize=8)
def _resampling(ratio: Fraction) -> tuple[NDArray[np.float64], int, int]:
    """torchaudio's resampling by a ratio, wanted to given rate, as one matrix (window, samples made of it).

    torchaudio itself makes its filter anew at each call, which takes longer than all the rest of the log-mel.

    Returns:
        The matrix, the zeros before the first sample, and the samples from one window to the next.
    """
    step = ratio.denominator
    filter = torchaudio.transforms.Resample(step, ratio.numerator, dtype=torch.float64, **_FILTER)
    rows = filter.kernel[:, 0].numpy()  # (samples made of `step` samples, window)
    steps = -(-32 // len(rows))
    matrix = np.zeros((rows.shape[1] + (steps - 1) * step, steps * len(rows)))
    for i in range(steps):
        matrix[i * step : i * step + rows.shape[1], i * len(rows) : (i + 1) * len(rows)] = rows.T
    return matrix, filter.width, steps * step


@cache
def _mel_matrix() -> NDArray[np.float64]:
    """(257, 64), HTK mel: triangles linear in mel (in Hz are torchaudio's), nothing of the constant."""

    def mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
        return 1127.0 * np.log1p(hertz / 700.0)

    bins = mel(np.linspace(0, SAMPLE_RATE / 2, FFT // 2 + 1))[:, None]
    low, high = mel(np.array([LOWEST_HZ, HIGHEST_HZ]))
    edges = np.linspace(low, high, MEL_BANDS + 2)
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre))
    matrix = np.maximum(triangles, 0.0)
    matrix[0] = 0.0
    return matrix
