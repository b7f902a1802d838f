"""Small sounds in the true formats, and what tests ask of prepared classification sets."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import av
import numpy as np

from crowdexit.data.classes import ClassStore


def tone(hertz=1000.0, rate=16_000, seconds=1.0, amplitude=0.5):
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


def hiss(seed=0, samples=16_000):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, samples)


def write_wav(path: Path, samples, rate=16_000, *, floats=False) -> Path:
    """(samples,) or (samples, channels), as PCM of 16 bits or as 32-bit floats; the head says any rate."""
    samples = np.asarray(samples)
    channels = samples.shape[1] if samples.ndim == 2 else 1
    data = samples.astype("<f4").tobytes() if floats else np.round(samples * 32_767).astype("<i2").tobytes()
    each = 4 if floats else 2
    form = struct.pack(
        "<HHIIHH", 3 if floats else 1, channels, rate, rate * channels * each % 2**32, channels * each, 8 * each
    )
    body = b"WAVEfmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", len(data)) + data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def write_au(path: Path, samples, rate=22_050) -> Path:
    data = np.round(np.asarray(samples) * 32_767).astype(">i2").tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b".snd" + struct.pack(">5I", 24, len(data), 3, rate, 1) + data)
    return path


def write_encoded(path: Path, samples, rate=16_000) -> Path:
    """A file of what its suffix says: .flac, or .ogg with Opus in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flac" if path.suffix == ".flac" else "libopus", rate=rate)
        stream.layout = "mono"
        pcm = np.round(np.asarray(samples) * 32_767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(pcm[None], format="s16", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(
            format=stream.format.name, layout="mono", rate=rate, frame_size=stream.frame_size or 0
        )
        for ready in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(ready))
        container.mux(stream.encode(None))
    return path


def break_some(folder: Path) -> dict[str, str]:
    """What may go wrong with a recording, put into a folder: file names, each with a part of the reason."""
    whole = write_wav(folder / "cut.wav", tone()).read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "head.wav").write_bytes(whole[:30])
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("no audio at all" * 20)
    write_wav(folder / "none.wav", [])
    write_wav(folder / "nan.wav", np.where(np.arange(8000) == 4000, np.nan, tone(seconds=0.5)), floats=True)
    write_wav(folder / "slow.wav", tone(), rate=10)
    write_wav(folder / "fast.wav", tone(), rate=2_000_000)
    os.mkfifo(folder / "pipe.wav")
    with (folder / "large.wav").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    (folder / "link.wav").symlink_to("nowhere.wav")
    return {
        "cut.wav": "cut short",
        "head.wav": "damaged or cut short",
        "empty.wav": "an empty file",
        "text.wav": "not a readable audio file",
        "none.wav": "no samples",
        "nan.wav": "not finite",
        "slow.wav": "a sample rate of 10 Hz",
        "fast.wav": "a sample rate of 2000000 Hz",
        "pipe.wav": "no such audio file",
        "large.wav": "1,099,511,627,776 bytes are too much",
        "link.wav": "no such audio file",
    }


def everything(path) -> dict[str, tuple[str, str, bytes]]:
    """Of every image by its id: split, class, values. No id stands in two splits."""
    found = {}
    with ClassStore(path) as store:
        for split in store.splits():
            for i, id in enumerate(store.ids(split)):
                assert id not in found
                found[id] = (split, store.classes[store.labels(split)[i]], store.image(split, i).tobytes())
    return found


def error(capsys) -> str:
    """The one line that a refusal is."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "preparing" not in line]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]
