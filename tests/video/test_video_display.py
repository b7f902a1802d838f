"""Frames are shown as they are meant: pixels that are not square, HDR, damage that decoders report."""

from __future__ import annotations

import csv
import json
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from hdr import encode_hdr
from videos import moving, tone, write_moving

from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions
from crowdexit.video.decode import Span
from crowdexit.video.frames import read_frames


def write_images(
    path: Path,
    images,
    *,
    codec: str = "libx264",
    aspect: Fraction | None = None,
    rotation: int = 0,
    options: dict[str, str] | None = None,
    pixels: str = "yuv420p",
    audio=None,
    audio_codec: str = "aac",
) -> Path:
    """Write frames H×W×3 (uint8, or uint16 of BT.2020) as a video of ten frames a second."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=10, options={"crf": "10", **(options or {})})
        video.height, video.width = images[0].shape[:2]
        video.pix_fmt = pixels
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        if rotation:
            video.set_display_rotation(rotation)
        if audio is not None:
            audio_stream = container.add_stream(audio_codec, rate=16_000, layout="mono")
        for index, image in enumerate(images):
            deep = image.dtype == np.uint16
            frame = av.VideoFrame.from_ndarray(image, format="rgb48le" if deep else "rgb24")
            if deep:
                frame = frame.reformat(format=pixels, dst_colorspace="BT2020", dst_color_range="MPEG")
            frame.pts, frame.time_base = index, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            block = av.AudioFrame.from_ndarray(np.asarray(audio, np.float32)[None], format="fltp", layout="mono")
            block.sample_rate = 16_000
            resampler = av.AudioResampler(
                audio_stream.format.name, "mono", 16_000, frame_size=audio_stream.frame_size or 0
            )
            for ready in [*resampler.resample(block), *resampler.resample(None)]:
                container.mux(audio_stream.encode(ready))
            container.mux(audio_stream.encode())
    return path


def frames(path: Path, fps: float = 10, **options):
    return list(read_frames(path, Span(fps), **options))


WIDE = moving(0, (192, 144))


def squeezed(width: int, height: int):
    return np.asarray(cv2.resize(WIDE, (width, height), interpolation=cv2.INTER_AREA), np.uint8)


@pytest.mark.parametrize(
    ("name", "codec"), [("v.mp4", "libx264"), ("v.mkv", "libx264"), ("v.ts", "libx264"), ("v.avi", "mpeg4")]
)
@pytest.mark.parametrize(
    ("aspect", "stored"), [(Fraction(4, 3), (144, 144)), (Fraction(3, 4), (192, 108)), (Fraction(2), (96, 144))]
)
def test_pixels_that_are_not_square(tmp_path, name, codec, aspect, stored):
    """Whether the container says so or only the codec (as in a transport stream); the smaller side grows."""
    path = write_images(tmp_path / name, [squeezed(*stored)] * 4, codec=codec, aspect=aspect)
    for frame in frames(path):
        assert frame.size == (192, 144)
        assert frame.image.shape == (144, 192, 3)
        assert np.abs(frame.image.astype(int) - WIDE).mean() < 12
        assert frame.warnings == ()
        np.testing.assert_array_equal(frame.image, frame.scaled((192, 144)))


def test_a_turned_video_of_pixels_that_are_not_square(tmp_path):
    """What is stated of pixels holds before the turn."""
    path = write_images(tmp_path / "v.mp4", [squeezed(96, 144)] * 4, aspect=Fraction(2), rotation=90)
    for frame in frames(path):
        assert frame.size == (144, 192)
        assert np.abs(frame.image.astype(int) - np.rot90(WIDE)).mean() < 12


def test_an_absurd_shape_of_pixels(tmp_path, counter, capsys):
    path = write_images(tmp_path / "v.mp4", [WIDE] * 4, aspect=Fraction(100))
    count_inputs(counter, [path], CountOptions(format="json", fps=10))
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert len(rows) == 4
    for row in rows:
        assert len(row["warnings"]) == 1
        assert "pixel aspect ratio of 100:1" in row["warnings"][0]
    assert err.count("100:1") == 1
    assert frames(path)[0].size == (192, 144)


def test_the_shape_of_pixels_may_change(tmp_path):
    """A broadcast goes from 4:3 to 16:9; the stream itself says so, frame by frame."""
    parts = [
        write_images(tmp_path / f"{i}.ts", [WIDE] * 12, codec="mpeg2video", aspect=aspect).read_bytes()
        for i, aspect in enumerate((Fraction(1), Fraction(4, 3)))
    ]
    (tmp_path / "v.ts").write_bytes(b"".join(parts))
    sizes = [frame.size for frame in frames(tmp_path / "v.ts", warn=lambda line: None)]
    assert sizes[0] == (192, 144)
    assert sizes[-1] == (256, 144)


def test_annotated_and_counted_in_square_pixels(tmp_path, counter, capsys):
    """The count of squeezed pixels is that of the whole frame, and the drawing is not squeezed."""
    full = write_images(tmp_path / "full.mp4", [WIDE] * 4)
    path = write_images(tmp_path / "v.mp4", [squeezed(96, 144)] * 4, aspect=Fraction(2))
    out = tmp_path / "out.mp4"
    count_inputs(counter, [path], CountOptions(fps=10, annotate=out))
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height) == (192, 144)
        assert stream.sample_aspect_ratio in (None, 1)
    capsys.readouterr()
    counts = []
    for each in (full, path):
        count_inputs(counter, [each], CountOptions(format="json", fps=10))
        counts.append([json.loads(line)["count"] for line in capsys.readouterr().out.splitlines()])
    np.testing.assert_allclose(counts[1], counts[0], rtol=0.02)


HDR = {"pq": "smpte2084", "hlg": "arib-std-b67"}


@pytest.mark.parametrize("transfer", HDR)
def test_hdr_is_shown_as_sdr(tmp_path, transfer):
    image = np.clip(moving(0, (192, 144)), 10, 220)
    tags = f"transfer={HDR[transfer]}:colorprim=bt2020:colormatrix=bt2020nc:range=tv"
    path = write_images(
        tmp_path / "v.mp4",
        [encode_hdr(image, transfer, 203)] * 3,
        pixels="yuv444p10le",
        options={"x264-params": tags},
    )
    for frame in frames(path):
        assert frame.display.transfer == transfer
        assert frame.warnings == ()
        shown = frame.image
        assert np.abs(shown.astype(int) - image).mean() < 4
        smaller = frame.scaled((96, 72)).astype(int)
        assert np.abs(smaller - cv2.resize(image, (96, 72), interpolation=cv2.INTER_AREA)).mean() < 4


def test_light_out_of_range_is_reported(tmp_path):
    path = write_images(tmp_path / "v.mp4", [WIDE] * 2, options={"x264-params": "transfer=linear"})
    assert [len(frame.warnings) for frame in frames(path)] == [1, 1]
    assert "linear light" in frames(path)[0].warnings[0]


def test_behind_damage_the_row_says_so(tmp_path, counter, capsys):
    """In all formats; told once on the standard error."""
    path = tmp_path / "v.mp4"
    write_moving(path, 30, key_every=10, rate=10, size=(128, 96))
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(container.streams.video[0]) if p.size]
        hurt = next(p for p in packets if p.is_keyframe and p.pts > 0)
        at, size = hurt.pos, hurt.size
    data = bytearray(path.read_bytes())
    for i in range(at + size // 3, at + size // 2):
        data[i] ^= 0x5A
    path.write_bytes(data)
    count_inputs(counter, [path], CountOptions(format="json", fps=10))
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    warned = [row["frame"] for row in rows if row["warnings"]]
    assert warned == [20]
    assert [row["warnings"] for row in rows if row["frame"] == 20] == [
        ["damaged from 0.9 to 2.0 s; nothing is counted there"]
    ]
    assert len(err.splitlines()) == 1
    target = tmp_path / "rows.csv"
    count_inputs(counter, [path], CountOptions(format="csv", fps=10, out=target))
    with target.open(newline="") as file:
        assert [row["frame"] for row in csv.DictReader(file) if "damaged" in row["warnings"]] == ["20"]


def test_damaged_beginning_is_reported(tmp_path):
    """AVI has no time stamps by which to know how much is missing."""
    path = tmp_path / "v.avi"
    write_moving(path, 30, codec="mpeg4", key_every=10, rate=10, size=(128, 96))
    data = bytearray(path.read_bytes())
    first = data.index(b"00dc", data.index(b"movi")) + 8
    for i in range(first + 100, first + 400):
        data[i] ^= 0x5A
    path.write_bytes(data)
    warnings: list[str] = []
    assert frames(path, warn=warnings.append)
    assert any("damaged at its beginning" in line for line in warnings)


def test_audio_status_of_each_frame(tmp_path, counter, capsys):
    """No audio track; one that ends before the frames; one that cannot be decoded."""
    mute = write_images(tmp_path / "mute.mp4", [WIDE] * 30)
    short = write_images(tmp_path / "short.mp4", [WIDE] * 30, audio=tone(1))
    broken = write_images(tmp_path / "broken.mkv", [WIDE] * 30, audio=tone(3) * 20.0, audio_codec="pcm_f32le")
    report = []
    for path in (mute, short, broken):
        count_inputs(counter, [path], CountOptions(format="json", fps=1))
        out, err = capsys.readouterr()
        report.append([json.loads(line)["audio"] for line in out.splitlines()])
        assert bool(err) == (path == broken)
    assert report == [["none"] * 3, ["used", "used", "none"], ["unreadable"] * 3]


def test_float_audio_of_any_scale(tmp_path, counter, capsys):
    """An audio track, and a file in its place, in ±32768: the counts of ±1, and a warning in the rows that hear it."""
    frame_step = write_images(tmp_path / "a.mkv", [WIDE] * 20, audio=tone(2), audio_codec="pcm_f32le")
    loud = write_images(tmp_path / "b.mkv", [WIDE] * 20, audio=tone(2) * 32_768, audio_codec="pcm_f32le")
    rows = []
    for path, audio in ((frame_step, None), (loud, None), (frame_step, loud)):
        count_inputs(counter, [path], CountOptions(format="json", fps=1, audio=audio))
        out, err = capsys.readouterr()
        rows.append([json.loads(line) for line in out.splitlines()])
        assert err.count("16-bit integers") == (loud in (path, audio))
    for several in zip(*rows, strict=True):
        assert len({row["count"] for row in several}) == 1
        assert [["16-bit integers" in line for line in row["warnings"]] for row in several] == [[], [True], [True]]


def test_audio_outside_of_all_frames(tmp_path, counter, capsys):
    video = write_images(tmp_path / "v.mp4", [WIDE] * 20)
    audio = write_images(tmp_path / "s.mkv", [WIDE], audio=tone(1), audio_codec="pcm_s16le")
    count_inputs(counter, [video], CountOptions(fps=10, start=1.9, audio=audio))
    assert f"warning: {audio}: not used" in capsys.readouterr().err


def test_what_is_enlarged_is_not_blurred(tmp_path):
    """A column in three is bright: as a player enlarges it, by cubic interpolation."""
    stripes = np.zeros((144, 96, 3), np.uint8)
    stripes[:, ::3] = 255
    path = write_images(tmp_path / "v.mkv", [stripes] * 2, aspect=Fraction(2), pixels="yuv444p")
    expected = np.asarray(cv2.resize(stripes, (192, 144), interpolation=cv2.INTER_CUBIC), np.uint8)
    assert np.abs(frames(path)[0].image[:, 4:-4].astype(int) - expected[:, 4:-4]).mean() < 8
