"""Sound as images for image classifiers: the spectrograms of the SL-ViT paper, in decibels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from crowdexit.data.log_mel import at_rate, checked_rate, mono
from crowdexit.data.mel import AudioError

SPEECH_RATE, MUSIC_RATE = 16_000, 22_050  # Hz, as Speech Commands and GTZAN are published
SPEECH_WINDOW, SPEECH_STEP, SPEECH_FFT = 255, 128, 256  # samples
MUSIC_SECONDS = 3
MUSIC_STFT = (512, 256)  # window and step, samples
MUSIC_MELS = ((2205, 1102, 4096), (1102, 551, 2048))  # 100 and 50 ms, steps of 50 and 25 ms, FFT
MEL_BANDS = 128
FLOOR_DB, TOP_DB = -120.0, 0.0  # see stft_image


@dataclass(frozen=True)
class Spectrogram:
    """How the sounds of a set have become images, so that others can be made like them.

    Attributes:
        form: ``stft`` (:func:`stft_image`) or ``gtzan`` (:func:`gtzan_image`).
        size: width and height. seconds: of the audio's beginning.

    Raises:
        ValueError: for another form, or a size or length that is none.
    """

    form: Literal["stft", "gtzan"]
    size: int
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if self.form not in ("stft", "gtzan") or not 0 < self.size <= 4096 or not 0 < self.seconds <= 3600:
            raise ValueError(f"not a spectrogram: {self}")

    def of(self, waveform: NDArray[np.generic] | torch.Tensor, sample_rate: int) -> NDArray[np.uint8]:
        """The image of a sound, (size, size, 3) uint8.

        Raises:
            AudioError: if the waveform or the rate is of no use.
        """
        if self.form == "gtzan":
            return gtzan_image(waveform, sample_rate, size=self.size)
        return stft_image(waveform, sample_rate, size=self.size, seconds=self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a prepared file."""
        return asdict(self)


def stft_image(
    waveform: NDArray[np.generic] | torch.Tensor, sample_rate: int, *, size: int = 224, seconds: float = 1.0
) -> NDArray[np.uint8]:
    """The spectrogram of speech, as the paper has it for Speech Commands.

    16 kHz mono, periodic Hann windows of 255 samples every 128 (no centring), FFT of 256: a second gives 129
    rows by 124 frames. Time runs to the right, low frequencies are at the bottom.

    The values are decibels relative to a sine of full scale, from −120 (black) to 0 (white), the same for every
    sound. Within ±1 only a clipped tone comes above the top, by 2 dB; what rounding to 16 bits leaves lies
    around −116, so that below the floor there is only digital silence and what has been filtered away.

    Args:
        waveform: as for :func:`crowdexit.data.log_mel.log_mel`. Of a longer sound the beginning is taken, a
            shorter one is followed by silence.
        sample_rate: Hz, 1,000 to 1,000,000; other rates than 16 kHz are resampled.
        size: width and height of the image.
        seconds: of the audio that the image shows.

    Returns:
        (size, size, 3) uint8, grey in three channels.

    Raises:
        AudioError: if the waveform is empty, not finite or not of this form, or the rate absurd.
    """
    samples = _exactly(beginning(waveform, sample_rate, SPEECH_RATE, seconds), round(seconds * SPEECH_RATE))
    magnitudes = _magnitudes(samples, SPEECH_WINDOW, SPEECH_STEP, SPEECH_FFT)
    return np.repeat(_image(20 * _log10(magnitudes), size)[..., None], 3, axis=2)


def gtzan_image(
    waveform: NDArray[np.generic] | torch.Tensor, sample_rate: int, *, size: int = 224
) -> NDArray[np.uint8]:
    """The three spectrograms of three seconds of music, as the paper has them for GTZAN.

    22,050 Hz mono, periodic Hann windows (no centring). Red: the Fourier transform, windows of 512 samples every
    256. Green and blue: 128 triangular bands from 0 Hz to half the rate, linear in HTK mel, of the powers under
    windows of 100 ms every 50 ms, and of 50 ms every 25 ms (rounded down to samples). Decibels, direction and
    colour scale as in :func:`stft_image`.

    Args:
        waveform: as there, but three seconds of it.
        sample_rate: Hz, 1,000 to 1,000,000; other rates than 22,050 Hz are resampled.
        size: width and height of the image.

    Returns:
        (size, size, 3) uint8.

    Raises:
        AudioError: if the waveform is empty, not finite or not of this form, or the rate absurd.
    """
    samples = _exactly(beginning(waveform, sample_rate, MUSIC_RATE, MUSIC_SECONDS), MUSIC_SECONDS * MUSIC_RATE)
    window, step = MUSIC_STFT
    channels = [20 * _log10(_magnitudes(samples, window, step, window))]
    for window, step, fft in MUSIC_MELS:
        channels.append(10 * _log10(_mel_matrix(fft) @ _magnitudes(samples, window, step, fft) ** 2))
    return np.stack([_image(decibels, size) for decibels in channels], axis=2)


def beginning(
    waveform: NDArray[np.generic] | torch.Tensor, sample_rate: int, wanted: int, seconds: float
) -> NDArray[np.float64]:
    """The first seconds of a sound, or all of a shorter one, in mono at ``wanted`` Hz: (samples,) float64 in ±1.

    Raises:
        AudioError: if the waveform is empty, not finite there or not of a usable form, or the rate absurd.
    """
    rate = checked_rate(sample_rate)
    array = np.asarray(waveform.detach().cpu()) if isinstance(waveform, torch.Tensor) else np.asarray(waveform)
    if array.ndim not in (1, 2):
        raise AudioError(f"a waveform of shape {array.shape}, not (samples,) or (channels, samples)")
    # Cut first: what comes after is then bounded, however long a file is.
    return at_rate(mono(array[..., : int(np.ceil(seconds * rate))]), rate, wanted)


def _exactly(samples: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    return np.pad(samples[:length], (0, max(0, length - len(samples))))


def _magnitudes(samples: NDArray[np.float64], window: int, step: int, fft: int) -> NDArray[np.float64]:
    """(fft / 2 + 1, frames) float64; a sine of amplitude one has the magnitude one.

    As many frames as windows fit in. torch.stft would put a window shorter than its FFT in the middle of it and
    count the frames by the FFT; the zeros around the audio make up for that.
    """
    hann = torch.hann_window(window, periodic=True, dtype=torch.float64)
    before = (fft - window) // 2
    padded = torch.from_numpy(np.pad(samples, (before, fft - window - before)))
    spectrum = torch.stft(padded, fft, step, window, hann, center=False, return_complex=True)
    return np.asarray(spectrum.abs() / (hann.sum() / 2))


@cache
def _mel_matrix(fft: int) -> NDArray[np.float64]:
    """(128, fft / 2 + 1). The FFTs are longer than their windows so that even the lowest bands hold a bin."""
    bands = torchaudio.functional.melscale_fbanks(fft // 2 + 1, 0.0, MUSIC_RATE / 2, MEL_BANDS, MUSIC_RATE)
    return np.asarray(bands.T, np.float64)


def _log10(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.log10(np.maximum(values, 1e-30))  # far below the floor


def _image(decibels: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Frequencies by frames, in decibels → (size, size) uint8, low frequencies at the bottom."""
    shades = ((np.clip(decibels, FLOOR_DB, TOP_DB) - FLOOR_DB) * (255 / (TOP_DB - FLOOR_DB)))[::-1].astype(np.float32)
    height, width = shades.shape
    # One side after the other, since one may shrink while the other grows.
    for shape, grows in (((width, size), size > height), ((size, size), size > width)):
        interpolation = cv2.INTER_LINEAR if grows else cv2.INTER_AREA
        shades = np.asarray(cv2.resize(shades, shape, interpolation=interpolation), np.float32)
    return np.clip(np.round(shades), 0, 255).astype(np.uint8)
