"""The log-mel equals VGGish's formulas written out, and every bad sound fails with one clear line."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import torch

from crowdexit.data.log_mel import log_mel, read_audio
from crowdexit.data.mel import AudioError


def reference(second):
    """The front end by its formulas, one frame and one band after the other, for 16,000 samples at 16 kHz."""
    mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731
    edges = [mel(125) + (mel(7500) - mel(125)) * i / 65 for i in range(66)]
    out = np.zeros((96, 64))
    for frame in range(96):
        windowed = [second[160 * frame + n] * (0.5 - 0.5 * np.cos(2 * np.pi * n / 400)) for n in range(400)] + [0] * 112
        magnitude = np.abs(np.fft.fft(windowed))[:257]
        for band in range(64):
            low, centre, high = edges[band : band + 3]
            at = mel(np.arange(257) * 16_000 / 512)
            weight = np.maximum(0, np.minimum((at - low) / (centre - low), (high - at) / (high - centre)))
            weight[0] = 0
            out[frame, band] = np.log(weight @ magnitude + 0.01)
    return out


def noise():
    return np.random.default_rng(0).normal(0, 0.2, 16_000)


def tone(hertz=1000.0, rate=16_000, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def speech():
    """Harmonics of a gliding voice under three formants, in syllables, with a hiss between them."""
    time = np.arange(16_000) / 16_000
    pitch = 120 + 20 * np.sin(2 * np.pi * 1.5 * time)
    phase = 2 * np.pi * np.cumsum(pitch) / 16_000
    voice = sum(
        np.exp(-(((120 * k - formant) / 150) ** 2)) * np.sin(k * phase)
        for formant in (500, 1500, 2500)
        for k in range(1, 30)
    )
    syllables = np.clip(np.sin(2 * np.pi * 4 * time), 0, None)
    return 0.2 * voice * syllables + 0.01 * (1 - syllables) * noise()


@pytest.mark.parametrize("audio", [noise, tone, speech, lambda: np.zeros(16_000)])
def test_equals_the_formulas(audio):
    second = audio()
    result = log_mel(second, 16_000)
    assert result.shape == (96, 64)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, reference(second), atol=1e-3)


def test_every_form_of_a_waveform():
    floats = np.round(noise().clip(-1, 1) * 32_000) / 32_768
    expected = log_mel(floats, 16_000)
    pcm = np.int16(floats * 32_768)
    for same in (
        torch.from_numpy(floats),
        torch.from_numpy(floats).float().requires_grad_(),
        pcm,
        pcm.astype(np.int32) << 16,
        floats[None],
        np.stack([floats * 1.5, floats * 0.5]),
        torch.from_numpy(pcm)[None],
    ):
        np.testing.assert_allclose(log_mel(same, 16_000), expected, atol=1e-3)
    assert log_mel(np.full(8000, 128, np.uint8), 8000).max() == pytest.approx(np.log(0.01))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 44_101, 48_000, 192_000])
def test_any_rate(rate):
    difference = log_mel(tone(rate=rate), rate) - log_mel(tone(), 16_000)
    assert np.abs(difference[2:-2]).max() < 0.05


def test_length():
    second = noise()
    expected = log_mel(second, 16_000)
    longer = np.concatenate([np.ones(4000), second, np.ones(4000)])
    np.testing.assert_array_equal(log_mel(longer, 16_000), expected)
    short = log_mel(second[:4000], 16_000)
    np.testing.assert_array_equal(short, log_mel(np.pad(second[:4000], 6000), 16_000))
    assert log_mel([0.5], 48_000).shape == (96, 64)


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
        (np.zeros(9, np.complex128), 16_000),
        (np.zeros(9, np.int64), 16_000),
        (["a"], 16_000),
        *((np.zeros(100), rate) for rate in (0, -1, 10, 10**9, float("nan"), 44_100.5)),
    ],
)
def test_no_audio(waveform, rate):
    with pytest.raises(AudioError) as error:
        log_mel(waveform, rate)
    assert "\n" not in str(error.value)


def write_wav(path: Path, samples, rate=48_000, channels=1) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.int16(np.asarray(samples) * 32_767).tobytes())
    return path


def test_read_wav(tmp_path):
    left, right = tone(rate=48_000), noise()[:16_000].clip(-1, 1).repeat(3)
    path = write_wav(tmp_path / "a.wav", np.stack([left, right], 1), channels=2)
    waveform, rate = read_audio(path)
    assert (waveform.shape, waveform.dtype, rate) == ((2, 48_000), np.float32, 48_000)
    np.testing.assert_allclose(waveform, [left, right], atol=1e-4)


def test_reading_a_file_that_is_not_audio(tmp_path, crowd_image):
    whole = write_wav(tmp_path / "whole.wav", tone()).read_bytes()
    contents = {
        "empty.wav": b"",
        "text.wav": b"no sound at all" * 20,
        "cut.wav": whole[: len(whole) // 2],
        "head.wav": whole[:30],
        "silent.wav": write_wav(tmp_path / "silent.wav", []).read_bytes(),
        "picture.jpg": crowd_image()[0],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in [*contents, "missing.wav", ".."]:
        with pytest.raises(AudioError) as error:
            read_audio(tmp_path / name)
        assert "\n" not in str(error.value)


def test_read_wav_from_a_pipe(tmp_path):
    """Writers that do not know the length put the largest one into the head; that is no cut."""
    data = bytearray(write_wav(tmp_path / "a.wav", tone()).read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert read_audio(tmp_path / "a.wav")[0].shape == (1, 16_000)
