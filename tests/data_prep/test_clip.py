"""The clip maker: a video whose every frame has a known count, marked simulated; and the bundled samples."""

from __future__ import annotations

import csv
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import crowdexit
from crowdexit.data.log_mel import read_audio
from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from data_prep import clip, common

SAMPLES = Path(crowdexit.__file__).parent / "samples"


@pytest.fixture
def inputs(tmp_path, crowd_picture):
    """A prepared file of one picture with 40 heads, and a folder of three voices."""
    for n in range(3):
        with wave.open(str(tmp_path / f"{n}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8_000)
            file.writeframes((np.sin(np.arange(2_400) * (0.1 + 0.05 * n)) * 20_000).astype("<i2").tobytes())
    image, points = crowd_picture(192, 128, heads=40)
    with open_for_writing(tmp_path / "set.h5") as file:
        write_sample(
            file,
            StoredSample(
                id="one",
                split="val",
                image=np.frombuffer(image, np.uint8),
                points=points.astype(np.float32),
                width=192,
                height=128,
                count=40,
            ),
        )
    return tmp_path / "set.h5", tmp_path


def run(*arguments) -> int:
    return common.run(clip.app, [*map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_clip(inputs, tmp_path):
    store, voices = inputs
    out = tmp_path / "out.mp4"
    arguments = ["--voices", voices, "--size", "96x64", "--seconds", 2, "--fps", 5]
    assert run(store, "one", out, *arguments) == 0
    with av.open(str(out)) as container:
        assert "simulated" in container.metadata["comment"]
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 96)] * 10
    waveform, rate = read_audio(out)
    assert rate == 16_000
    assert 32_000 <= waveform.shape[1] <= 32_000 + 2_048
    table = rows(out.with_suffix(".csv"))
    assert [(row["frame"], row["time_s"]) for row in table[:2]] == [("0", "0.000"), ("1", "0.200")]
    # Heads are 25 light pixels on a dark ground, so the light in a frame tells how many it shows.
    light = [np.count_nonzero(frame > 130) / 25 for frame in frames]
    assert np.corrcoef(light, [int(row["count"]) for row in table])[0, 1] > 0.8


def test_counts_are_of_the_heads_inside():
    points = np.array([[0, 0], [9.9, 9.9], [10, 5], [5, 10], [12, 12]], np.float32)
    assert clip.counts_inside(points, np.array([[0, 0], [3, 3], [50, 50]]), 10, 10) == [2, 4, 0]
    assert clip.counts_inside(np.zeros((0, 2), np.float32), np.array([[0, 0]]), 10, 10) == [0]


def test_bad_input_is_one_line_and_code_2(inputs, tmp_path, capsys):
    store, voices = inputs
    out = tmp_path / "out.mp4"
    for arguments, reason in [
        ((store, "two", out), "no picture 'two'"),
        ((store, "one", out), "smaller than the window"),
        ((store, "one", out, "--size", "97x64"), "even"),
        ((store, "one", out, "--size", "huge"), "not of the form"),
        ((store, "one", tmp_path / "out.csv", "--size", "96x64"), ".mp4"),
        ((store, "one", tmp_path / "nowhere" / "out.mp4", "--size", "96x64"), "cannot be written"),
        ((tmp_path / "none.h5", "one", out), "no such prepared file"),
    ]:
        assert run(*arguments, "--voices", voices) == 2, reason
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert reason in error[0]
    assert not list(tmp_path.rglob("*.mp4"))


def test_bundled_clip_is_short_small_and_marked():
    path = SAMPLES / "clip.mp4"
    assert path.stat().st_size < 1_500_000
    with av.open(str(path)) as container:
        assert "simulated" in container.metadata["comment"]
        assert {stream.codec_context.name for stream in container.streams} == {"h264", "aac"}
        assert container.duration <= 10 * av.time_base
        frames = sum(1 for _ in container.decode(video=0))
    counts = [int(row["count"]) for row in rows(SAMPLES / "clip.csv")]
    assert len(counts) == frames
    assert min(counts) < 30 < 120 < max(counts)


@pytest.mark.parametrize("name", ["street", "crowd"])
def test_bundled_pictures_have_their_heads(name):
    with Image.open(SAMPLES / f"{name}.jpg") as picture:
        width, height = picture.size
    heads = [(float(row["x"]), float(row["y"])) for row in rows(SAMPLES / f"{name}.csv")]
    assert len(heads) == {"street": 200, "crowd": 536}[name]
    assert all(0 <= x < width and 0 <= y < height for x, y in heads)


def test_bundled_sound_is_a_second():
    waveform, rate = read_audio(SAMPLES / "street-simulated.wav")
    assert (waveform.shape, rate) == ((1, 16_000), 16_000)
