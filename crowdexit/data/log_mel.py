"""One second of any waveform turned into VGGish's log-mel image."""

from __future__ import annotations

from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from crowdexit.data.audio import Warn, full_scale, refuse, scale_warning
from crowdexit.data.audio import read_audio as read_audio
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
_IN_ONE_THREAD = 2**18  # multiply-adds of a product up to which OpenBLAS uses no other thread


def log_mel(
    waveform: NDArray[np.generic] | torch.Tensor, sample_rate: int, *, warn: Warn = refuse
) -> NDArray[np.float32]:
    """One second of audio as VGGish takes it (Hershey et al., CNN architectures for large-scale audio, 2017).

    16 kHz mono, magnitudes of a Fourier transform of 512 under periodic Hann windows of 25 ms every 10 ms
    (no centring), 64 triangular bands from 125 to 7500 Hz that are linear in HTK mel, log(mel + 0.01). A
    second gives 98 frames; the first 96 are the example, as in the published framing.

    Args:
        waveform: (samples,) or (channels, samples), floats in ±1 or integer PCM of 8, 16 or 32 bits (scaled
            to ±1, unsigned ones around their middle). Channels are averaged. Of a longer sound the middle
            second is taken, a shorter one is put in the middle of silence.
        sample_rate: Hz, 1,000 to 1,000,000.
        warn: is called with one line where floats are rescaled (see :func:`crowdexit.data.audio.full_scale`);
            default: that is an error.

    Returns:
        (96, 64) float32, time by frequency.

    Raises:
        AudioError: if the waveform is empty, not finite or not of this form, or the rate absurd.
    """
    rate = checked_rate(sample_rate)
    array = _checked(waveform)
    first = max(0, (array.shape[-1] - rate) // 2)
    # Cut before anything is computed: what comes after is then bounded, however long the waveform is.
    samples = _mono(array[..., first : first + rate], _scale_of(array, warn))
    missing = rate - len(samples)
    second = at_rate(np.pad(samples, (missing // 2, missing - missing // 2)), rate, SAMPLE_RATE)
    second = np.pad(second, (0, max(0, SAMPLE_RATE - len(second))))[:SAMPLE_RATE]
    frames = np.lib.stride_tricks.sliding_window_view(second, WINDOW)[::HOP][:FRAMES]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    magnitudes = np.abs(np.fft.rfft(frames * window, FFT))
    return np.log(_product(magnitudes, _mel_matrix()) + LOG_OFFSET).astype(np.float32)


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
        AudioError: if it is empty, not finite, not within ±1 or not of this form.
    """
    array = _checked(waveform)
    return _mono(array, _scale_of(array, refuse))


def _checked(waveform: NDArray[np.generic] | torch.Tensor) -> NDArray[np.generic]:
    """A waveform as an array (samples,) or (channels, samples) of a usable type."""
    array = waveform.detach().cpu().numpy() if isinstance(waveform, torch.Tensor) else np.asarray(waveform)
    if array.ndim not in (1, 2) or (array.ndim == 2 and array.shape[0] > _MOST_CHANNELS):
        raise AudioError(f"a waveform of shape {array.shape}, not (samples,) or (channels, samples)")
    if array.size == 0:
        raise AudioError("a waveform without samples")
    if array.dtype.kind != "f" and not (array.dtype.kind in "iu" and array.dtype.itemsize <= 4):
        raise AudioError(f"a waveform of {array.dtype}, not of floats or 8, 16 or 32 bit integers")
    return array


def _scale_of(array: NDArray[Any], warn: Warn) -> float:
    """By what to divide a waveform."""
    if array.dtype.kind in "iu":
        return float(2 ** (8 * array.dtype.itemsize - 1))
    peak = max(-float(array.min()), float(array.max()))
    try:
        scale = full_scale(peak)
    except AudioError as error:
        raise AudioError(f"a waveform that cannot be used: {error}") from None
    if scale > 1:
        warn(f"the waveform's {scale_warning(peak, scale)}")
    return scale


def _mono(array: NDArray[Any], scale: float) -> NDArray[np.float64]:
    """(samples,) float64 in ±1: the mean of the channels, unsigned ones around their middle."""
    scaled = array / np.float64(scale) - (1.0 if array.dtype.kind == "u" else 0.0)
    return np.asarray(scaled if scaled.ndim == 1 else scaled.mean(axis=0), np.float64)


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
    matrix: NDArray[np.float64] = np.maximum(triangles, 0.0)
    matrix[0] = 0.0
    return matrix
