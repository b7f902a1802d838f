"""Spectrograms as pictures: tones light their rows, loudness is as stated, every bad sound is one clear line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from audio_files import hiss, tone

from crowdexit.data import spectrogram
from crowdexit.data.mel import AudioError
from crowdexit.data.spectrogram import gtzan_image, stft_image


def brightest(channel) -> float:
    """Where the brightest row is: 0 at the lower edge of the image, 1 at the upper."""
    return 1 - (channel.astype(float).mean(axis=1).argmax() + 0.5) / len(channel)


def mel(hertz):
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


@pytest.mark.parametrize("size", [32, 64, 224])
@pytest.mark.parametrize("hertz", [250, 1000, 3000, 7500])
def test_a_tone_lights_its_row(size, hertz):
    image = stft_image(tone(hertz), 16_000, size=size)
    assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
    np.testing.assert_array_equal(image[..., 0], image[..., 1])
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert brightest(image[..., 0]) == pytest.approx(hertz / 8000, abs=1.5 / size)


@pytest.mark.parametrize("amplitude", [1.0, 0.1, 0.01])
def test_loudness_is_in_decibels_of_full_scale(amplitude):
    """At 129 rows none is mixed with another, and the tone is on one of them all the time."""
    image = stft_image(tone(2000, amplitude=amplitude), 16_000, size=129)[..., 0]
    expected = 255 * (1 + 20 * np.log10(amplitude) / 120)
    np.testing.assert_allclose(image[128 - 32, 2:-2], expected, atol=1)


def test_no_audio_exceeds_the_scale():
    """The noise of rounding to 16 bits lies near the floor and not below it; a clipped tone tops it by little."""
    rounded = np.random.default_rng(0).integers(-1, 2, 16_000) / 32_768
    assert (stft_image(rounded, 16_000) == 0).mean() < 0.01
    for loud in (hiss() * 2, tone(amplitude=1.0), np.sign(tone(440))):
        assert (stft_image(loud, 16_000) == 255).mean() < 0.02
        assert (gtzan_image(np.tile(loud, 5)[:66_150], 22_050) == 255).mean() < 0.05
    assert not stft_image(np.zeros(16_000), 16_000).any()


@pytest.mark.parametrize(
    ("window", "step", "fft", "frames"), [(255, 128, 256, 61), (512, 256, 512, 30), (2205, 1102, 4096, 6)]
)
def test_magnitudes_equal_the_formula(window, step, fft, frames):
    samples = hiss(samples=8000)
    found = spectrogram._magnitudes(samples, window, step, fft)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    for frame in (0, 1, frames - 1):
        part = samples[frame * step : frame * step + window] * hann
        waves = np.exp(-2j * np.pi * np.outer(np.arange(fft // 2 + 1), np.arange(window)) / fft)
        np.testing.assert_allclose(found[:, frame], np.abs(waves @ part) / (hann.sum() / 2), atol=1e-9)
    # One more step, and the window would not fit in.
    assert found.shape == (fft // 2 + 1, frames)
    assert frames * step + window > 8000 >= (frames - 1) * step + window


@pytest.mark.parametrize(("window", "step", "fft"), spectrogram.MUSIC_MELS)
def test_mel_bands_equal_the_formula(window, step, fft):
    assert abs(window / 22_050 - 2 * step / 22_050) < 1e-4
    edges = np.linspace(0, mel(11_025), 130)
    hertz = 700 * (10 ** (edges / 2595) - 1)
    at = np.arange(fft // 2 + 1) * 22_050 / fft
    matrix = spectrogram._mel_matrix(fft)
    assert matrix.shape == (128, fft // 2 + 1)
    for band in range(128):
        low, centre, high = hertz[band : band + 3]
        expected = np.maximum(0, np.minimum((at - low) / (centre - low), (high - at) / (high - centre)))
        np.testing.assert_allclose(matrix[band], expected, atol=2e-3)
    assert (matrix.max(axis=1) > 0.3).all()  # no band without a bin


@pytest.mark.parametrize("hertz", [100, 440, 5000])
def test_a_tone_in_music_lights_a_row_of_each_channel(hertz):
    image = gtzan_image(tone(hertz, rate=22_050, seconds=3), 22_050, size=128)
    assert (image.shape, image.dtype) == ((128, 128, 3), np.uint8)
    assert brightest(image[..., 0]) == pytest.approx(hertz / 11_025, abs=0.015)
    for channel in (1, 2):
        assert brightest(image[..., channel]) == pytest.approx(mel(hertz) / mel(11_025), abs=0.015)


def test_the_three_channels_see_time_differently():
    """A click is the longer the longer the window: 100 ms in green, 50 in blue, 23 in red; all at its place."""
    samples = np.zeros(66_150)
    samples[33_075] = 1
    lit = (gtzan_image(samples, 22_050, size=224) > 0).any(axis=0)
    assert lit[:, 1].sum() > 1.5 * lit[:, 2].sum() > 2 * lit[:, 0].sum() > 0
    for channel in range(3):
        assert np.flatnonzero(lit[:, channel]).mean() == pytest.approx(112, abs=4)


def test_time_runs_right_and_short_audio_ends_in_silence():
    half = tone(seconds=0.5)
    image = stft_image(half, 16_000, size=64)
    assert image[:, :30].max() > 200
    assert not image[:, 34:].any()
    np.testing.assert_array_equal(image, stft_image(np.pad(half, (0, 8000)), 16_000, size=64))
    assert stft_image([0.5], 48_000, size=64).shape == (64, 64, 3)


def test_only_the_beginning_is_read():
    second = hiss()
    longer = np.concatenate([second, np.full(9999, np.nan)])
    np.testing.assert_array_equal(stft_image(longer, 16_000, size=32), stft_image(second, 16_000, size=32))
    music = hiss(samples=66_150)
    longer = np.concatenate([music, np.full(9999, np.nan)])
    np.testing.assert_array_equal(gtzan_image(longer, 22_050, size=32), gtzan_image(music, 22_050, size=32))


def test_seconds():
    audio = np.concatenate([tone(1000), tone(6000)])
    image = stft_image(audio, 16_000, size=64, seconds=2)
    assert brightest(image[:, :31, 0]) == pytest.approx(1 / 8, abs=0.03)
    assert brightest(image[:, 33:, 0]) == pytest.approx(6 / 8, abs=0.03)


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 44_101, 192_000])
def test_any_rate(rate):
    expected = stft_image(tone(), 16_000, size=32)[:, 2:-2].astype(int)
    found = stft_image(tone(rate=rate), rate, size=32)[:, 2:-2].astype(int)
    # The tone; the rest is far below it, where resampling leaves what it may.
    np.testing.assert_allclose(found[expected > 130], expected[expected > 130], atol=2)
    assert brightest(found[..., 0]) == brightest(expected[..., 0])
    music = gtzan_image(tone(rate=rate, seconds=3), rate, size=32)
    assert brightest(music[..., 0]) == pytest.approx(1000 / 11_025, abs=0.05)


def test_every_form_of_a_waveform():
    floats = np.round(hiss() * 32_000) / 32_768
    expected = stft_image(floats, 16_000, size=32)
    pcm = np.int16(floats * 32_768)
    for same in (
        torch.from_numpy(floats).requires_grad_(),
        pcm,
        floats[None],
        np.stack([floats * 1.5, floats * 0.5]),
        torch.from_numpy(pcm)[None],
    ):
        np.testing.assert_array_equal(stft_image(same, 16_000, size=32), expected)
    left = np.stack([tone(1000), np.zeros(16_000)])
    np.testing.assert_array_equal(stft_image(left, 16_000, size=32), stft_image(tone(amplitude=0.25), 16_000, size=32))


@pytest.mark.parametrize("make", [stft_image, gtzan_image])
@pytest.mark.parametrize(
    ("waveform", "rate"),
    [
        (np.zeros(0), 16_000),
        (np.zeros((2, 0)), 16_000),
        (np.zeros((16_000, 2)), 16_000),
        (np.zeros((1, 1, 100)), 16_000),
        (np.float64(1), 16_000),
        ([0.0, np.nan], 16_000),
        ([0.0, np.inf], 16_000),
        (np.zeros(9, np.int64), 16_000),
        (["a"], 16_000),
        *((np.zeros(100), rate) for rate in (0, -1, 10, 10**9, float("nan"), 44_100.5)),
    ],
)
def test_no_audio(make, waveform, rate):
    with pytest.raises(AudioError) as error:
        make(waveform, rate, size=32)
    assert "\n" not in str(error.value)
