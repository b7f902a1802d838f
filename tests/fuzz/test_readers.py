"""Mutated files of every kind: no exception but the readers' own, no crash, in bounded time and memory.

The cases are fixed by their numbers. A few run always, all of them with ``-m slow``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import wave
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pillow_heif
import pytest
import torch
from PIL import Image

from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from crowdexit.models import zoo

READING = Path(__file__).with_name("reading.py")
FEW, MANY = 60, 2000  # cases of each kind
MOST_SECONDS = 20.0  # of a case, on a machine that is busy
MOST_KB = 1_500_000  # over what the process took for the first case


def photo(width: int = 96, height: int = 64) -> Image.Image:
    rng = np.random.default_rng(0)
    rough = Image.fromarray(rng.integers(0, 255, (height // 8, width // 8, 3), np.uint8))
    return rough.resize((width, height), Image.Resampling.BICUBIC)


def write_image_files(folder: Path) -> None:
    image = photo()
    for suffix in ("jpg", "png", "webp", "tif", "bmp", "gif", "ppm"):
        image.save(folder / f"image.{suffix}")
    image.save(folder / "pages.tiff", save_all=True, append_images=[image.rotate(180)], compression="tiff_lzw")
    image.save(folder / "progressive.jpeg", progressive=True, exif=_exif())
    deep = np.asarray(image.convert("L"), np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    Image.fromarray(np.asarray(image.convert("L"), np.float32)).save(folder / "float.tif")
    pillow_heif.from_pillow(image).save(folder / "image.heic")


def write_plain_image_files(folder: Path) -> None:
    image = photo()
    image.save(folder / "image.jpg", exif=_exif())
    image.convert("L").save(folder / "progressive.jpg", progressive=True)
    image.save(folder / "image.png", exif=_exif())
    image.convert("P").save(folder / "palette.png", transparency=3)
    image.convert("RGBA").save(folder / "transparent.png")


def _exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def write_audio_files(folder: Path) -> None:
    samples = np.sin(np.arange(16_000) / 5).astype(np.float32) * 0.5
    pcm = (samples * 32_767).astype(np.int16)
    with wave.open(str(folder / "sound.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(pcm.tobytes())
    for name, codec in (
        ("sound.flac", "flac"),
        ("sound.mp3", "libmp3lame"),
        ("sound.m4a", "aac"),
        ("sound.ogg", "libopus"),
    ):
        with av.open(str(folder / name), "w") as container:
            _encode_audio(container, container.add_stream(codec, rate=16_000, layout="mono"), samples)


def _encode_audio(container, stream, samples) -> None:
    block = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
    block.sample_rate, block.pts = 16_000, 0
    size = stream.codec_context.frame_size
    convert = av.AudioResampler(format=stream.format.name, layout="mono", rate=16_000, frame_size=size or None)
    for part in [*convert.resample(block), *convert.resample(None)]:
        container.mux(stream.encode(part))
    container.mux(stream.encode())


def videos(folder: Path) -> None:
    samples = np.sin(np.arange(16_000) / 5).astype(np.float32) * 0.5
    for name, codec in (
        ("clip.mp4", "libx264"),
        ("clip.mkv", "libx264"),
        ("clip.avi", "mpeg4"),
        ("clip.webm", "libvpx"),
    ):
        with av.open(str(folder / name), "w") as container:
            video = container.add_stream(codec, rate=8)
            video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
            audio = (
                container.add_stream("aac", rate=16_000, layout="mono") if name in ("clip.mp4", "clip.mkv") else None
            )
            for index in range(16):
                frame = av.VideoFrame.from_image(photo().rotate(10 * index))
                frame.pts, frame.time_base = index, Fraction(1, 8)
                container.mux(video.encode(frame))
            container.mux(video.encode())
            if audio is not None:
                _encode_audio(container, audio, samples)


def stores(folder: Path) -> None:
    buffer = BytesIO()
    photo().save(buffer, "JPEG")
    rng = np.random.default_rng(1)
    with open_for_writing(folder / "crowd.h5") as file:
        for split, id in (("train", "A_1"), ("train", "B_2"), ("val", "A_3")):
            points = rng.uniform((0, 0), (96, 64), (5, 2)).astype(np.float32)
            mel = rng.normal(size=(96, 64)).astype(np.float32)
            sample = StoredSample(
                id=id,
                split=split,
                image=np.frombuffer(buffer.getvalue(), np.uint8),
                points=points,
                width=96,
                height=64,
                count=5.0,
                log_mel=mel,
                audio_source="simulated",
            )
            write_sample(file, sample)


def checkpoints(folder: Path) -> None:
    torch.manual_seed(0)
    changes = {
        "width": 0.0625,
        "audio_width": 0.0625,
        "size": [128, 64],
        "dim": 4,
        "heads": 2,
        "hidden": 8,
        "filters": 2,
    }
    spec = zoo.Spec("audiocsrnet-s", (zoo.ExitSpec("V1", "V1", "slvit"),), changes, {"recipe": "none"})
    zoo.save(zoo.build(spec), spec, folder / "model.safetensors")


MAKERS = {
    "image": write_image_files,
    "plain-image": write_plain_image_files,
    "audio": write_audio_files,
    "video": videos,
    "store": stores,
    "checkpoint": checkpoints,
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("number", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_no_reader_lets_a_damaged_file_out(kind, number, tmp_path):
    MAKERS[kind](tmp_path)
    first = 0
    found: list[str] = []
    while first < number:  # a case that ends the process is named, and the next ones go on
        lines = _run(kind, tmp_path, first, number, found)
        ended = [line for line in lines if "seconds" in line]
        found += [
            f"case {line['case']}: took {line['seconds']:.1f} s" for line in ended if line["seconds"] > MOST_SECONDS
        ]
        found += [f"case {line['case']}: opened {line['foreign']}" for line in ended if line["foreign"]]
        found += [f"case {line['case']}: {line['escaped']}" for line in lines if "escaped" in line]
        if ended and ended[-1]["peak"] - ended[0]["peak"] > MOST_KB:
            found.append(f"memory grew by {(ended[-1]['peak'] - ended[0]['peak']) // 1024} MB")
        first = lines[-1]["case"] + 1 if lines else number
    assert not found, "\n".join(found)
    refused = [line for line in ended if line["error"]]
    assert refused, "nothing was damaged"


def _run(kind: str, folder: Path, first: int, last: int, found: list[str]) -> list[dict]:
    """What the reading process wrote, line by line."""
    command = [sys.executable, str(READING), kind, str(folder), str(first), str(last)]
    paths = os.pathsep.join(filter(None, (str(READING.parents[2]), os.environ.get("PYTHONPATH", ""))))
    budget = 60 + MOST_SECONDS + 2 * (last - first)
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=budget,
            env={**os.environ, "PYTHONPATH": paths},
            check=False,
        )
        output, rc, problem = done.stdout, done.returncode, done.stderr
    except subprocess.TimeoutExpired as error:
        raw = error.stdout or b""
        output, rc, problem = raw.decode() if isinstance(raw, bytes) else raw, None, "timeout"
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    if rc != 0 and not any("escaped" in line for line in lines):
        at = lines[-1]["case"] if lines else "none"
        found.append(f"case {at}: ended with {rc}: {problem[-300:]}")
    return lines
