"""Audio files as people have them: odd tags and names, floats of any scale, guessed lengths, hours of silence."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from audio_files import hiss, tone, write_encoded, write_wav

from crowdexit.data import audio as audio_module
from crowdexit.data.audio import full_scale, read_audio, read_middle_second
from crowdexit.data.log_mel import log_mel
from crowdexit.data.mel import AudioError
from data_prep.labelled import read_recording


def encode(path: Path, samples, codec: str, format: str, *, rate=16_000, bit_rate=None, options=None) -> Path:
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        if bit_rate is not None:
            stream.bit_rate = bit_rate
        block = av.AudioFrame.from_ndarray(np.asarray(samples, np.float32)[None], format="fltp", layout="mono")
        block.sample_rate = rate
        resampler = av.AudioResampler(stream.format.name, "mono", rate, frame_size=stream.frame_size or 0)
        for ready in [*resampler.resample(block), *resampler.resample(None)]:
            container.mux(stream.encode(ready))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("bits", [16, 24, 32])
def test_floats_that_are_integers(tmp_path, bits):
    """Scaled to ±1 with a warning, by the loudest sample of the whole file; or refused where nobody sees a warning."""
    audio = np.concatenate([tone(amplitude=0.001, seconds=1), tone(seconds=2)])
    path = write_wav(tmp_path / "a.wav", audio * 2.0 ** (bits - 1), floats=True)
    warnings: list[str] = []
    waveform, rate = read_audio(path, warn=warnings.append)
    np.testing.assert_allclose(waveform[0], audio, atol=1e-6)
    begin, _ = read_audio(path, seconds=1, warn=warnings.append)
    np.testing.assert_allclose(begin[0], audio[:rate], atol=1e-6)
    middle, _ = read_middle_second(path, warn=warnings.append)
    np.testing.assert_allclose(middle[0], audio[rate : 2 * rate], atol=1e-6)
    assert len(set(warnings)) == 1
    assert len(warnings) == 3
    assert warnings[0].startswith(f"{path}: samples reach ")
    assert f"{bits}-bit integers" in warnings[0]
    for read in (read_audio, read_middle_second, read_recording):
        with pytest.raises(AudioError, match=f"{bits}-bit integers"):
            read(path)


def test_floats_a_little_over_one(tmp_path):
    audio = tone(amplitude=3.5).astype(np.float32)
    waveform, _ = read_audio(write_wav(tmp_path / "a.wav", audio, floats=True))
    np.testing.assert_array_equal(waveform[0], audio)


@pytest.mark.parametrize("peak", [5.0, 100.0, 1e12])
def test_floats_that_nothing_explains(tmp_path, peak):
    path = write_wav(tmp_path / "a.wav", tone(amplitude=1) * peak, floats=True)
    with pytest.raises(AudioError, match=r"a\.wav: samples reach .* expected within ±1"):
        read_middle_second(path, warn=lambda line: None)
    with pytest.raises(AudioError, match="expected within ±1"):
        log_mel(tone(amplitude=1) * peak, 16_000, warn=lambda line: None)
    with pytest.raises(AudioError, match="expected within ±1"):
        full_scale(peak)


def test_float_arrays_that_are_integers():
    warnings: list[str] = []
    scaled = log_mel(tone(amplitude=0.5) * 32_768, 16_000, warn=warnings.append)
    np.testing.assert_allclose(scaled, log_mel(tone(amplitude=0.5), 16_000), atol=1e-5)
    assert len(warnings) == 1
    with pytest.raises(AudioError, match="16-bit integers"):
        log_mel(tone() * 32_768, 16_000)


def test_values_that_are_not_finite(tmp_path):
    path = write_wav(tmp_path / "nan.wav", np.where(np.arange(8000) == 4000, np.nan, tone(seconds=0.5)), floats=True)
    for read in (read_audio, read_middle_second):
        with pytest.raises(AudioError, match=r"nan\.wav: it has values that are not finite"):
            read(path)


def test_tags_that_are_not_utf_8(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone())
    expected = read_audio(path)[0]
    artist = "Café".encode("latin-1") + b"\0"
    info = b"INFOIART" + struct.pack("<I", len(artist)) + artist + b"\0" * (len(artist) % 2)
    data = path.read_bytes() + b"LIST" + struct.pack("<I", len(info)) + info
    path.write_bytes(b"RIFF" + struct.pack("<I", len(data) - 8) + data[8:])
    np.testing.assert_array_equal(read_audio(path)[0], expected)


def test_a_name_with_a_colon(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_wav(Path("file:a.wav"), tone())
    assert read_audio("file:a.wav")[0].shape == (1, 16_000)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.wav", "ffconcat version 1.0\nfile 'other.wav'\n"),
        ("a.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.wav\n#EXT-X-ENDLIST\n"),
    ],
)
def test_lists_of_other_files(tmp_path, name, text):
    write_wav(tmp_path / "other.wav", tone())
    (tmp_path / name).write_text(text)
    with pytest.raises(AudioError, match="a list of other files"):
        read_audio(tmp_path / name)


def test_a_length_guessed_from_the_bit_rate(tmp_path):
    """Of ADTS and of MP3 without an index FFmpeg only guesses the length: here by far too much."""
    silence, loud = np.zeros(64_000), hiss(samples=64_000)
    aac = encode(tmp_path / "a.aac", np.concatenate([silence, loud]), "aac", "adts")
    quiet, rest = (
        encode(tmp_path / f"{bit_rate}.mp3", samples, "libmp3lame", "mp3", bit_rate=bit_rate, options=NO_INDEX)
        for samples, bit_rate in ((silence, 8_000), (loud, 128_000))
    )
    mp3 = tmp_path / "a.mp3"
    mp3.write_bytes(quiet.read_bytes() + rest.read_bytes())
    for path in (aac, mp3):
        with av.open(str(path)) as container:
            stream = container.streams.audio[0]
            assert stream.duration * stream.time_base > 16
        waveform, rate = read_audio(path)
        assert waveform.shape[1] / rate == pytest.approx(8, abs=0.3)
        assert read_middle_second(path)[0].shape == (1, rate)


NO_INDEX = {"write_xing": "0", "id3v2_version": "0"}


def test_a_file_that_says_how_long_it_is_and_is_cut(tmp_path):
    path = write_encoded(tmp_path / "a.flac", hiss(samples=64_000))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(AudioError, match="cut short"):
        read_audio(path, warn=lambda line: None)


@pytest.mark.parametrize("seconds", [0.4, 1, 5.3])
@pytest.mark.parametrize("few", [audio_module._FEW_VALUES, 100])
def test_the_middle_second_is_that_of_the_whole(tmp_path, monkeypatch, seconds, few):
    """Whether the file is held or decoded twice."""
    monkeypatch.setattr(audio_module, "_FEW_VALUES", few)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (round(seconds * 16_000), 2))
    for path in (
        write_wav(tmp_path / "a.wav", samples),
        write_encoded(tmp_path / "a.flac", samples[:, 0]),
        write_encoded(tmp_path / "a.ogg", samples[:, 0]),
    ):
        waveform, rate = read_audio(path)
        first = max(0, (waveform.shape[1] - rate) // 2)
        middle, _ = read_middle_second(path)
        np.testing.assert_array_equal(middle, waveform[:, first : first + rate])
        np.testing.assert_array_equal(log_mel(middle, rate), log_mel(waveform, rate))


def test_a_long_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "silence.flac"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac", rate=48_000, layout="stereo")
        block = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 4096), np.int16), format="s16", layout="stereo")
        block.sample_rate = 48_000
        for _ in range(48_000 * 240 // 4096):
            block.pts = None
            container.mux(stream.encode(block))
        container.mux(stream.encode())
    tracemalloc.start()
    waveform, rate = read_middle_second(path)
    beginning, _ = read_audio(path, seconds=1)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert waveform.shape == beginning.shape == (2, rate)
    assert most < 60e6  # all of it is 92 MB as float32


def test_audio_beyond_all_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_module, "_MOST_VALUES", 10_000)
    path = write_wav(tmp_path / "a.wav", tone())
    with pytest.raises(AudioError, match=r"a\.wav: longer than .* minutes"):
        read_middle_second(path)
    monkeypatch.setattr(audio_module, "_MOST_HELD", 5_000)
    with pytest.raises(AudioError, match="too long to hold"):
        read_audio(path)
    assert read_audio(path, seconds=0.1)[0].shape == (1, 1600)


def test_an_array_of_an_hour_is_cut_before_it_is_converted():
    hour = np.zeros((2, 16_000 * 600), np.int16)
    tracemalloc.start()
    log_mel(hour, 16_000)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 20e6


@pytest.mark.parametrize("suffix", ["flac", "wav", "m4a", "mka"])
def test_eight_channels_are_averaged(tmp_path, suffix):
    """7.1: PyAV's own reader of planes runs behind the last of eight."""
    rng = np.random.default_rng(0)
    channels = (0.2 * np.sin(np.arange(16_000) / rng.uniform(3, 30, (8, 1)))).astype(np.float32)
    packed = np.ascontiguousarray((channels.T * 32_767).astype(np.int16)).reshape(1, -1)
    path = tmp_path / f"surround.{suffix}"
    codec = {"flac": "flac", "wav": "pcm_s16le", "m4a": "aac", "mka": "flac"}[suffix]
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=16_000, layout="7.1")
        resampler = av.AudioResampler(stream.codec_context.format.name, "7.1", 16_000, stream.frame_size or 1024)
        block = av.AudioFrame.from_ndarray(packed, "s16", "7.1")
        block.rate, block.pts = 16_000, 0
        for part in (*resampler.resample(block), *resampler.resample(None)):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    samples, rate = read_audio(path)
    assert rate == 16_000
    assert samples.shape[0] == 8
    length = min(samples.shape[1], 16_000)
    off = np.abs(samples[:, :length] - channels[:, :length])
    if suffix == "m4a":  # AAC begins with samples of its own, and is lossy
        assert 0.5 < samples.std() / channels.std() < 1.5
    else:
        assert off.max() < 1e-3


def test_wav_files_that_ffmpeg_misreads_are_refused(tmp_path):
    """Big-endian ones, and 24 bits in 32 as some recorders write them."""
    plain = write_wav(tmp_path / "a.wav", tone()).read_bytes()
    (tmp_path / "rifx.wav").write_bytes(b"RIFX" + plain[4:])
    with pytest.raises(AudioError, match=r"a big-endian WAV \(RIFX\) is not supported; save it as WAV"):
        read_audio(tmp_path / "rifx.wav")
    samples = (tone() * 2**31).astype("<i4")
    for valid in (24, 32):
        extra = struct.pack("<HHI", 22, valid, 4) + struct.pack("<H", 1) + bytes.fromhex("000000001000800000aa00389b71")
        form = struct.pack("<HHIIHH", 0xFFFE, 1, 16_000, 64_000, 4, 32) + extra
        body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", samples.nbytes)
        path = tmp_path / f"{valid}.wav"
        path.write_bytes(b"RIFF" + struct.pack("<I", len(body) + samples.nbytes) + body + samples.tobytes())
    with pytest.raises(AudioError, match="a WAV with 24 bits in samples of 32 is not supported"):
        read_audio(tmp_path / "24.wav")
    np.testing.assert_allclose(read_audio(tmp_path / "32.wav")[0][0], tone(), atol=1e-6)
