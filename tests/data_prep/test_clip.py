"""The clip maker: an annotated excerpt, a still and a made-up crowd, with simulated audio; and the bundled samples."""

from __future__ import annotations

import csv
import wave
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import crowdexit
from crowdexit.data.log_mel import read_audio
from data_prep import clip, common

SAMPLES = Path(crowdexit.__file__).parent / "samples"
SIZE = (96, 64)
START, EVERY = 3, 4


def place(frame: int) -> tuple[int, int]:
    """Where the head of the made video is: from frame 3 on it goes to the right."""
    return 20 + 2 * (frame - START), 30


@pytest.fixture
def inputs(tmp_path):
    """A grey video of 15 frames with one light head, its table from frame 3 on, and a folder of three voices."""
    for n in range(3):
        with wave.open(str(tmp_path / f"{n}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8_000)
            file.writeframes((np.sin(np.arange(2_400) * (0.1 + 0.05 * n)) * 20_000).astype("<i2").tobytes())
    with av.open(str(tmp_path / "in.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5, options={"qscale": "1"})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        for frame in range(15):
            pixels = np.full((SIZE[1], SIZE[0], 3), 40, np.uint8)
            x, y = place(frame)
            pixels[y - 5 : y + 6, x - 5 : x + 6] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    heads = [f"{frame},{place(START + frame)[0]},{place(START + frame)[1]}" for frame in (0, 4)]
    (tmp_path / "heads.csv").write_text("\n".join(["frame,x,y", *heads, "4,1.5,2", ""]))
    return tmp_path / "in.avi", tmp_path / "heads.csv", "--start", START


def run(*arguments) -> int:
    return common.run(clip.app, [*map(str, arguments)])


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def light(image: np.ndarray) -> tuple[float, float]:
    """The middle of what is light in a grey image, x and y."""
    y, x = np.nonzero(image > 130)
    return float(x.mean()), float(y.mean())


def test_excerpt(inputs, tmp_path):
    out = tmp_path / "out.mp4"
    assert run("excerpt", *inputs[:2], out, *inputs[2:], "--voices", tmp_path, "--frames", 10, "--every", EVERY) == 0
    with av.open(str(out)) as container:
        assert "simulated" in container.metadata["comment"]
        assert "frames 3 to 12 of in.avi" in container.metadata["comment"]
        video = container.streams.video[0]
        assert (video.codec_context.name, video.average_rate, video.sample_aspect_ratio) == ("h264", 5, Fraction(1))
        frames = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    assert [frame.shape for frame in frames] == [(64, 96)] * 10
    for number, frame in enumerate(frames):
        assert light(frame) == pytest.approx(place(START + number), abs=0.6)
    waveform, rate = read_audio(out)
    assert rate == 16_000
    assert 32_000 <= waveform.shape[1] <= 32_000 + 2_048
    expected = [("0", "0.000", "1"), ("4", "0.800", "2"), ("8", "1.600", "0")]  # no row: nobody
    assert [tuple(row.values()) for row in rows(out.with_suffix(".csv"))] == expected
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.csv", "out.mp4"]


def test_audio_follows_the_counts(inputs, tmp_path):
    bank = clip.read_voices(tmp_path)["test"]
    track = clip.simulate_track([0, 0, 0, 2_000, 2_000, 2_000], bank, seed=0)
    seconds = np.square(track.reshape(6, -1)).mean(axis=1)
    assert track.shape == (6 * 16_000,)
    assert seconds[4:].min() > 2 * seconds[:3].max()
    assert np.array_equal(track, clip.simulate_track([0, 0, 0, 2_000, 2_000, 2_000], bank, seed=0))
    assert not np.array_equal(track, clip.simulate_track([0, 0, 0, 2_000, 2_000, 2_000], bank, seed=1))


def test_still(inputs, tmp_path):
    out = tmp_path / "out.jpg"
    assert run("still", *inputs[:2], out, *inputs[2:], "--voices", tmp_path, "--frame", 4) == 0
    with Image.open(out) as image:
        assert light(np.asarray(image.convert("L"))) == pytest.approx(place(START + 4), abs=0.6)
        assert image.info["comment"] == b"frame 7 of in.avi"
    x, y = place(START + 4)
    assert rows(tmp_path / "out.csv") == [{"x": f"{x:.1f}", "y": f"{y:.1f}"}, {"x": "1.5", "y": "2.0"}]
    waveform, rate = read_audio(tmp_path / "out-simulated.wav")
    assert (waveform.shape, rate) == ((1, 16_000), 16_000)
    assert np.abs(waveform).max() > 0


def test_collage_is_full_of_heads(inputs, tmp_path):
    (tmp_path / "heads.csv").write_text("frame,x,y\n0,20,30\n4,28,30\n")
    out = tmp_path / "out.jpg"
    assert run("collage", *inputs[:2], out, *inputs[2:], "--side", 20) == 0
    with Image.open(out) as image:
        grey = np.asarray(image.convert("L"))
    assert grey.shape == (60, 80)
    squares = grey.reshape(3, 20, 4, 20).swapaxes(1, 2).reshape(12, 20, 20)
    for square in squares:
        assert light(square) == pytest.approx((10, 10), abs=0.6)


def test_each_head_comes_equally_often():
    frames = [np.full((8, 12, 3), 10 * number, np.uint8) for number in range(3)]
    points = [(number, 11.9, 0.0) for number in range(3)]  # in a corner: the square is moved into the frame
    crowd = clip.fill(frames, points, 4, np.random.default_rng(0))
    assert crowd.shape == (8, 12, 3)
    assert np.unique(crowd[::4, ::4, 0], return_counts=True)[1].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("frame,x\n0,1\n", "line 2: not frame,x,y"),
        ("frame,x,y\n0,1,2\n0,1\n", "line 3: not frame,x,y"),
        ("frame,x,y\n0,nan,2\n", "line 2: outside the 96×64 image"),
        ("frame,x,y\n0,96,2\n", "line 2: outside the 96×64 image"),
        ("frame,x,y\n2,1,2\n", "line 2: frame 2 is not one of those annotated"),
        ("frame,x,y\n-4,1,2\n", "line 2: frame -4 is not one of those annotated"),
        ("\xff", "heads.csv: cannot be read"),
    ],
)
def test_a_table_that_is_none_is_one_line_and_code_2(inputs, tmp_path, capsys, text, reason):
    (tmp_path / "heads.csv").write_bytes(text.encode("latin-1"))
    out = tmp_path / "out.mp4"
    assert run("excerpt", *inputs[:2], out, *inputs[2:], "--voices", tmp_path, "--frames", 8, "--every", EVERY) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert reason in error
    assert not list(tmp_path.glob("out*"))


def test_bad_input_is_one_line_and_code_2(inputs, tmp_path, capsys):
    video, heads, *start = inputs
    voices = ["--voices", tmp_path]
    (tmp_path / "no-video.avi").write_bytes(b"no video")
    mp4, jpg = tmp_path / "out.mp4", tmp_path / "out.jpg"
    for arguments, reason in [
        (("excerpt", tmp_path / "none.avi", heads, mp4, *voices), "none.avi: cannot be read as a video"),
        (("excerpt", tmp_path / "no-video.avi", heads, mp4, *voices), "no-video.avi: cannot be read as a video"),
        (("excerpt", tmp_path / "0.wav", heads, mp4, *voices), "0.wav: has no video stream"),
        (("excerpt", video, heads, mp4, *voices, *start, "--frames", 13), "in.avi: ends before frame 15"),
        (("excerpt", video, tmp_path / "none.csv", mp4, *voices, "--frames", 5), "none.csv: cannot be read"),
        (("excerpt", video, heads, jpg, *voices, "--frames", 5), "must end in .mp4"),
        (
            ("excerpt", video, heads, tmp_path / "no" / "out.mp4", *voices, "--frames", 5, "--every", 4),
            "cannot be written",
        ),
        (("still", video, heads, mp4, *voices), "must end in .jpg"),
        (("still", video, heads, jpg, *voices, "--frame", 1), "no heads in frame 1"),
        (("still", video, heads, tmp_path / "no" / "out.jpg", *voices), "cannot be written"),
        (("collage", video, heads, mp4), "must end in .jpg"),
        (("collage", video, heads, jpg, "--side", 65), "--side 65: larger than the 96×64 video"),
    ]:
        assert run(*arguments) == 2, reason
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1
        assert reason in error[0]
    assert not list(tmp_path.rglob("out*"))


def test_bundled_clip_is_short_small_and_marked():
    path = SAMPLES / "clip.mp4"
    assert path.stat().st_size < 1_000_000
    with av.open(str(path)) as container:
        assert "simulated" in container.metadata["comment"]
        assert "frames 690 to 789 of vtest.avi" in container.metadata["comment"]
        assert {stream.codec_context.name for stream in container.streams} == {"h264", "aac"}
        assert container.duration == 10 * av.time_base
        video = container.streams.video[0]
        assert (video.width, video.height, video.average_rate, video.sample_aspect_ratio) == (768, 576, 10, 1)
        assert sum(1 for _ in container.decode(video)) == 100


def test_bundled_counts_are_those_of_the_heads():
    heads = rows(SAMPLES / "clip-heads.csv")
    counts = rows(SAMPLES / "clip.csv")
    assert [(int(row["frame"]), float(row["time_s"])) for row in counts] == [(5 * n, n / 2) for n in range(20)]
    for row in counts:
        assert int(row["count"]) == sum(head["frame"] == row["frame"] for head in heads) >= 7
    assert all(0 <= float(head["x"]) < 768 and 0 <= float(head["y"]) < 576 for head in heads)
    assert len(heads) == 163


def test_bundled_heads_move_as_people_walk():
    """From one annotated frame to the next every head but those that come or go has one within half a second's walk."""
    places: dict[int, list[complex]] = {}
    for head in rows(SAMPLES / "clip-heads.csv"):
        places.setdefault(int(head["frame"]), []).append(complex(float(head["x"]), float(head["y"])))
    for frame in range(0, 95, 5):
        now, then = places[frame], places[frame + 5]
        lost = [head for head in now if min(abs(head - other) for other in then) > 45]
        new = [head for head in then if min(abs(head - other) for other in now) > 45]
        assert len(lost) <= 1
        assert len(new) <= 1


def test_bundled_images():
    with Image.open(SAMPLES / "street.jpg") as image:
        assert image.size == (768, 576)
        assert image.info["comment"] == b"frame 715 of vtest.avi"
    of_the_clip = [(row["x"], row["y"]) for row in rows(SAMPLES / "clip-heads.csv") if row["frame"] == "25"]
    assert [(row["x"], row["y"]) for row in rows(SAMPLES / "street.csv")] == of_the_clip
    with Image.open(SAMPLES / "crowd.jpg") as image:
        assert image.size == (768, 576)
        assert image.info["comment"].startswith(b"768 squares around heads in vtest.avi")


def test_bundled_audio_is_one_second():
    waveform, rate = read_audio(SAMPLES / "street-simulated.wav")
    assert (waveform.shape, rate) == ((1, 16_000), 16_000)
