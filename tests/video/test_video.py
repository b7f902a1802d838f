"""Frames by their time stamps, each with the second of audio around it, in memory that does not grow."""

from __future__ import annotations

import errno
import shutil
import struct
import weakref
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from videos import Wrapped, grey, index_of, make_video, tone, write_audio_only

from crowdexit.calibration.intervals import Intervals
from crowdexit.data.log_mel import read_audio
from crowdexit.data.mel import AudioError
from crowdexit.inference.errors import CounterError
from crowdexit.inference.policies import Confident, DeepestThatFits
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.pipeline import count_frames
from crowdexit.video import audio as audio_module
from crowdexit.video import container as container_module
from crowdexit.video.annotate import AnnotatedVideo, VideoWriteError
from crowdexit.video.audio import AudioTrack, Places
from crowdexit.video.container import VideoError
from crowdexit.video.decode import Span
from crowdexit.video.frames import expected_rows, read_frames

TENTHS = [i / 10 for i in range(30)]


def refuse(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def frames(path: Path, *, audio: Path | None = None, warn=refuse, **span):
    return list(read_frames(path, Span(**span), audio=audio, warn=warn))


def counted(counter, path: Path, *, warn=refuse, fps: float = 1.0, **options):
    return list(count_frames(counter, read_frames(path, Span(fps), warn=warn), str(path), CountOptions(**options)))


def loudness(frame) -> float:
    return 0.0 if frame.waveform is None else float(np.abs(frame.waveform[0]).mean())


@pytest.mark.parametrize(
    ("fps", "expected"),
    [
        (1.0, [0, 10, 20]),
        (2.0, list(range(0, 30, 5))),
        (3.0, [0, 4, 7, 10, 14, 17, 20, 24, 27]),
        (0.5, [0, 20]),
        (1000.0, list(range(30))),
    ],
)
def test_frames_are_taken_by_their_time_stamps(tmp_path, fps, expected):
    path = make_video(tmp_path / "v.mp4", TENTHS)
    got = frames(path, fps=fps)
    assert [f.index for f in got] == expected
    assert [index_of(f.image) for f in got] == expected
    assert [f.time_s for f in got] == pytest.approx([TENTHS[i] for i in expected])
    assert all(f.waveform is None for f in got)
    assert got[0].image.shape == (64, 96, 3)
    assert got[0].image.dtype == np.uint8


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_variable_frame_rate(tmp_path, name):
    times = [0.0, 0.1, 0.15, 0.9, 1.04, 1.2, 3.7, 3.8, 4.0]
    path = make_video(tmp_path / name, times)
    # The first at or after 0, 1, 2 (and 3: nothing came sooner), 4.
    got = frames(path)
    assert [f.index for f in got] == [0, 4, 6, 8]
    assert [f.time_s for f in got] == pytest.approx([0, 1.04, 3.7, 4.0], abs=0.0015)
    assert [f.time_s for f in frames(path, fps=1000)] == pytest.approx(times, abs=0.0015)


def test_rounded_time_stamps_do_not_shift_the_choice(tmp_path):
    # Thirds of a second in Matroska's whole milliseconds lie a little before the thirds themselves.
    path = make_video(tmp_path / "v.mkv", [i / 30 for i in range(60)])
    assert [f.index for f in frames(path, fps=3)] == [0, 10, 20, 30, 40, 50]


def test_time_begins_with_the_first_frame(tmp_path):
    """MPEG-TS begins anywhere; the tone still falls on its frames."""
    path = make_video(tmp_path / "v.ts", [7 + t for t in TENTHS], audio=tone(3, begin=1.5, end=2), audio_start=7)
    with av.open(str(path)) as container:
        assert container.start_time > 5 * av.time_base
    got = frames(path)
    assert [f.time_s for f in got] == pytest.approx([0, 1, 2], abs=0.001)
    assert loudness(got[0]) < 0.01 < loudness(got[2])


@pytest.mark.parametrize("rotation", [90, -90, 180])
def test_rotation(tmp_path, rotation):
    path = make_video(tmp_path / "v.mp4", [0, 0.1], rotation=rotation, left_dark=True)
    image = frames(path)[0].image
    expected = np.full((64, 96), float(grey(0)))
    expected[:, :48] = 0
    expected = np.rot90(expected, rotation // 90)  # both turn anticlockwise
    assert image.shape[:2] == expected.shape
    assert np.abs(image.mean(axis=2) - expected).mean() < 4


@pytest.mark.parametrize(("name", "codec", "rate"), [("v.mp4", "aac", 44_100), ("v.mkv", "pcm_s16le", 16_000)])
def test_the_second_around_each_frame(tmp_path, name, codec, rate):
    audio = tone(4, begin=1.6, end=2.4, rate=rate)
    path = make_video(tmp_path / name, [i / 10 for i in range(40)], audio=audio, rate=rate, audio_codec=codec)
    got = frames(path, fps=2)
    assert [f.waveform[1] for f in got] == [rate] * 8
    assert all(len(f.waveform[0]) == rate for f in got)
    # 0.3 s of the tone are within half a second of 1.5 s, all of it of 2 s, none of it of 1 s (ends at 1.5 s).
    mean = 0.5 * 2 / np.pi
    expected = [0, 0, 0, 0.4, 0.8, 0.4, 0, 0]
    assert [loudness(f) / mean for f in got] == pytest.approx(expected, abs=0.02)
    # The middle sample is the frame's own time, to a few milliseconds.
    at = got[3].waveform[0]
    assert np.flatnonzero(np.abs(at) > 0.05)[0] == pytest.approx(0.6 * rate, abs=0.005 * rate)


def test_ends_of_the_audio_are_padded(tmp_path):
    path = make_video(tmp_path / "v.mkv", TENTHS, audio=tone(3), audio_codec="pcm_s16le")
    first, *_, last = frames(path, fps=10)
    assert not first.waveform[0][:7_900].any()
    assert np.abs(first.waveform[0][8_000:]).mean() > 0.2
    assert np.abs(last.waveform[0][:9_500]).mean() > 0.2  # 2.9 s: 0.6 s of audio are left
    assert not last.waveform[0][9_700:].any()


def test_no_audio_beyond_the_end_of_the_track(tmp_path):
    path = make_video(tmp_path / "v.mp4", TENTHS, audio=tone(1.5))
    has_audio = {f.index: f.waveform is not None for f in frames(path, fps=10)}
    assert has_audio[14]  # 0.6 s before the end of the audio are in its second
    assert not has_audio[17]
    assert not any(has_audio[i] for i in range(17, 30))


def test_audio_from_another_file(tmp_path):
    path = make_video(tmp_path / "v.mp4", TENTHS, audio=tone(3, begin=0, end=0.5))
    other = make_video(tmp_path / "other.mkv", [0, 0.1], audio=tone(3, begin=2), audio_codec="pcm_s16le")
    own, replaced = frames(path), frames(path, audio=other)
    assert [loudness(f) > 0.01 for f in own] == [True, False, False]
    assert [loudness(f) > 0.01 for f in replaced] == [False, False, True]
    with pytest.raises(AudioError, match="no audio track"):
        frames(path, audio=make_video(tmp_path / "mute.mp4", [0, 0.1]))
    with pytest.raises(AudioError, match="no such"):
        frames(path, audio=tmp_path / "none.wav")


def test_neither_frames_nor_audio_pile_up(tmp_path):
    path = make_video(tmp_path / "v.mp4", [i / 10 for i in range(200)], audio=tone(20))
    made, alive, most_samples = [], 0, 0
    for frame in read_frames(path, Span(10), warn=refuse):
        made.append(weakref.ref(frame))
        del frame
        alive = max(alive, sum(ref() is not None for ref in made))
    assert len(made) == 200
    assert alive <= 1
    track = AudioTrack(path, 0.0, refuse)
    for tenth in range(200):
        track.second_around(tenth / 10)
        most_samples = max(most_samples, sum(len(samples) for _, samples in track._window._held))
    assert most_samples < 1.3 * 16_000
    # Also when a long stretch is passed over at once.
    track = AudioTrack(path, 0.0, refuse)
    assert track.second_around(19.0) is not None
    assert sum(len(samples) for _, samples in track._window._held) < 1.3 * 16_000


@pytest.mark.parametrize("batch", [1, 4, 6])
def test_a_frame_counts_what_it_counts_alone(tmp_path, counter, batch):
    path = make_video(tmp_path / "v.mp4", TENTHS, audio=tone(3, begin=1))
    got = counted(counter, path, fps=2, batch=batch)
    assert [f.index for f, _ in got] == [0, 5, 10, 15, 20, 25]
    alone = [counter.count(f.image, f.waveform).count for f in frames(path, fps=2)]
    assert [r.count for _, r in got] == pytest.approx(alone, rel=1e-5)
    assert len(set(alone)) == 6
    assert {r.chosen.exit for _, r in got} == {"final"}
    together = counter.count_many([(f.image, f.waveform) for f, _ in got])
    assert [result.count for result in together] == pytest.approx(alone, rel=1e-4)
    density = got[3][1].chosen.density
    assert density is not None
    assert density.sum() == pytest.approx(alone[3], rel=1e-4)


def test_large_frames_are_scaled_while_decoding(tmp_path, counter):
    """What the network looks at is smaller; only frames that are cut into tiles are needed as they are."""
    assert counter.size == (128, 64)
    for size, looked_at in {(256, 96): (128, 48), (96, 64): (96, 64), (640, 64): None}.items():
        assert counter.size_for(*size) == looked_at
        path = make_video(tmp_path / f"{size[0]}.mkv", [0, 0.5], size=size, left_dark=True, codec="ffv1")
        (first, result), _ = counted(counter, path, fps=2)
        assert first.size == size
        assert result.count == pytest.approx(counter.count(first.image).count, rel=0.02)


class Block:
    """Decoded sound of a tenth of a second, at 100 Hz, with a stamp."""

    layout = av.AudioLayout("mono")

    def __init__(self, time: float | None) -> None:
        self.time = time

    def to_ndarray(self):
        return np.zeros((1, 10), np.float32)


@pytest.mark.parametrize(
    ("stamps", "places"),
    [
        ([2.0, 2.1, 2.2], [0, 10, 20]),
        ([0.0, 0.101, 0.2], [0, 10, 20]),  # coarse
        ([None, None, 0.2], [0, 10, 20]),
        ([0.0, 0.5, 0.6], [0, 50, 60]),  # a gap
        ([0.0, 0.1, 100.0, 0.3, 0.4], [0, 10, 20, 30, 40]),  # one wrong stamp
        ([0.0, 0.1, 30.0, 0.3, 0.4], [0, 10, 20, 30, 40]),
        ([5.0, 5.1, 1.0, 5.3, 5.4], [0, 10, 20, 30, 40]),
        ([0.0, 0.1, 100.0, 100.1, 100.2], [0, 10, 20, 10010, 10020]),  # a long gap
        ([5.0, 5.1, 0.0, 0.1, 0.2, 0.7], [0, 10, 20, 30, 40, 90]),  # a clock that is set back
    ],
)
def test_timestamps_of_audio(stamps, places):
    place = Places(100, None)
    assert [place(Block(time))[0] for time in stamps] == places


def test_timestamps_of_live_audio():
    """A block of the clock before is the first; the others come to where the new one has them."""
    place = Places(100, 0.0, continues=False)
    assert [place(Block(time))[0] for time in (100.0, 0.0, 0.1, 0.2)] == [10_000, 10_010, 10, 20]


def test_audio_continues_when_its_clock_is_set_back(tmp_path):
    """Two recordings one behind the other: the frames of the second are heard with its audio."""
    paths = [
        make_video(tmp_path / f"{name}.ts", TENTHS, audio=tone(3, **on), key_every=5)
        for name, on in (("silent", {"begin": 3}), ("loud", {}))
    ]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(path.read_bytes() for path in paths))
    report: list[str] = []
    levels = [loudness(frame) for frame in read_frames(joined, Span(2), warn=report.append)]
    assert len(levels) == 12
    assert max(levels[:5]) < 0.01
    assert min(levels[7:-1]) > 0.1


def test_audio_changes_the_count(tmp_path, counter):
    path = make_video(tmp_path / "v.mp4", [0, 0.5, 1.0], audio=tone(2))
    mute = make_video(tmp_path / "mute.mp4", [0, 0.5, 1.0])
    has_audio, unheard = ([r.count for _, r in counted(counter, p)] for p in (path, mute))
    assert has_audio != pytest.approx(unheard, rel=1e-6)


def test_exit_and_deadline(tmp_path, counter):
    path = make_video(tmp_path / "v.mp4", TENTHS)
    assert {r.chosen.exit for _, r in counted(counter, path, exit="AV1")} == {"AV1"}
    assert {r.chosen.exit for _, r in counted(counter, path, deadline_ms=1e-3)} == {"V1"}
    assert {r.in_time for _, r in counted(counter, path, deadline_ms=1e5)} == {True}
    assert [(f.index, r) for f, r in counted(counter, path, deadline_ms=1e-3, late="fail")] == [
        (index, None) for index in (0, 10, 20)
    ]
    with pytest.raises(CounterError, match="needs a deadline"):
        counted(counter, path, policy=DeepestThatFits())


def test_a_frame_leaves_when_its_count_is_sure(tmp_path, counter, monkeypatch):
    """As it does alone, whoever else is in its batch."""
    path = make_video(tmp_path / "v.mp4", TENTHS, audio=tone(3, begin=1))
    with pytest.raises(CounterError, match="no intervals"):
        counted(counter, path, policy=Confident(share=0.5))
    widths = {"V1": 0.9, "AV1": 0.9, "AV2": 0.3, "final": 0.1}
    monkeypatch.setattr(counter.predictor, "intervals", Intervals(0.9, widths, widths))
    alone = [counter.count(f.image, f.waveform).exits for f in frames(path, fps=5)]
    halves = sorted((r.interval[1] - r.count) for exits in alone for r in exits if r.exit == "V1")
    policy = Confident(uncertainty=float(np.mean(halves[6:8])))  # half of them leave at once
    together = counted(counter, path, fps=5, policy=policy, batch=4)
    expected = [counter.count(f.image, f.waveform, policy=policy) for f in frames(path, fps=5)]
    assert [r.chosen.exit for _, r in together] == [r.chosen.exit for r in expected]
    assert [r.count for _, r in together] == pytest.approx([r.count for r in expected], rel=1e-5)
    assert len({r.chosen.exit for r in expected}) > 1


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_cut_short(tmp_path, name, counter):
    """The frames until there are counted, and it is said once."""
    whole = make_video(tmp_path / name, [i / 10 for i in range(40)], codec="mpeg4", key_every=1)
    data = whole.read_bytes()
    if name == "v.mp4":  # the index at its front, as in most files for the web
        with (
            av.open(str(whole)) as source,
            av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "faststart"}) as out,
        ):
            stream = out.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
        data = (tmp_path / "front.mp4").read_bytes()
    cut = tmp_path / ("cut" + whole.suffix)
    cut.write_bytes(data[: int(0.6 * len(data))])
    lines: list[str] = []
    rows = counted(counter, cut, warn=lines.append)
    assert 1 < len(rows) < 4
    assert len(lines) == 1
    assert str(cut) in lines[0]
    assert "\n" not in lines[0]


def test_damaged_in_the_middle(tmp_path, counter, capfd):
    path = make_video(tmp_path / "v.mkv", [i / 10 for i in range(40)], codec="mpeg4", key_every=1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    path.write_bytes(bytes(data))
    lines: list[str] = []
    rows = counted(counter, path, warn=lines.append)
    assert [f.index for f, _ in rows] in ([0, 10], [0, 10, 20])  # the damage begins about frame 20
    assert len(lines) == 1
    assert capfd.readouterr() == ("", "")


def test_missing_packets_are_reported(tmp_path):
    """A format that finds its way behind them does not say so itself."""
    path = make_video(tmp_path / "v.ts", [i / 10 for i in range(100)], key_every=5)
    data = path.read_bytes()
    begin, end = (round(share * len(data) / 188) * 188 for share in (0.4, 0.8))
    path.write_bytes(data[:begin] + data[end:])
    lines: list[str] = []
    got = frames(path, warn=lines.append)
    assert len(got) < 9
    assert len(lines) == 1
    assert "damaged or without frames from" in lines[0]


def test_by_default_damage_is_a_warning(tmp_path, counter):
    path = make_video(tmp_path / "v.mkv", [i / 10 for i in range(40)], codec="mpeg4", key_every=1)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.warns(UserWarning, match="v.mkv"):
        list(read_frames(path))


def test_audio_is_not_used_after_damage(tmp_path):
    """FLAC knows when a block is not whole."""
    path = make_video(tmp_path / "v.mp4", TENTHS)
    audio = tmp_path / "s.flac"
    with av.open(str(audio), "w") as container:
        stream = container.add_stream("flac", rate=16_000, layout="mono")
        noise = np.random.default_rng(0).integers(-9_000, 9_000, (1, 48_000)).astype(np.int16)
        block = av.AudioFrame.from_ndarray(noise, format="s16", layout="mono")
        block.sample_rate = 16_000
        container.mux(stream.encode(block))
        container.mux(stream.encode())
    data = bytearray(audio.read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    audio.write_bytes(bytes(data))
    lines: list[str] = []
    has_audio = [f.waveform is not None for f in frames(path, fps=2, audio=audio, warn=lines.append)]
    assert has_audio == [True, True, True, True, False, False] or has_audio == [True, True, True, False, False, False]
    assert len(lines) == 1


def test_no_frames(tmp_path):
    path = tmp_path / "v.mp4"
    write_audio_only(path)
    with pytest.raises(VideoError, match="no moving frame"):
        frames(path)
    empty = make_video(tmp_path / "empty.avi", [], codec="mpeg4")
    with pytest.raises(VideoError, match=r"empty\.avi: "):
        frames(empty)


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100, b"\x00\x00\x00\x18ftypmp42" + bytes(500)])
def test_not_a_video(tmp_path, content):
    path = tmp_path / "v.mp4"
    path.write_bytes(content)
    with pytest.raises(VideoError, match=r"v\.mp4: ") as caught:
        frames(path)
    assert "\n" not in str(caught.value)
    assert expected_rows(path) == 0


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan"), float("inf")])
def test_impossible_rates(tmp_path, fps):
    with pytest.raises(VideoError, match="frames a second"):
        frames(make_video(tmp_path / "v.mp4", [0, 0.1]), fps=fps)


def test_too_small_is_said_with_the_name(tmp_path, counter):
    path = make_video(tmp_path / "v.mp4", [0, 0.1], size=(16, 16))
    with pytest.raises(VideoError, match=r"v\.mp4.*too small"):
        counted(counter, path)


def test_names_with_colons_are_no_addresses(tmp_path, monkeypatch):
    make_video(tmp_path / "v.mp4", [0, 0.1]).rename(tmp_path / "10:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert len(frames(Path("10:30.mp4"))) == 1


def test_expected_rows(tmp_path):
    path = make_video(tmp_path / "v.mp4", TENTHS)
    assert expected_rows(path) == 3
    assert expected_rows(path, Span(2)) == 6
    assert expected_rows(path, Span(100)) == 30


def test_annotated_video(tmp_path):
    """The frames at their times, and the audio in step with them."""
    path = make_video(tmp_path / "v.mp4", [i / 10 for i in range(40)], audio=tone(4, begin=2), size=(97 // 2 * 2, 64))
    out = tmp_path / "out.mp4"
    with AnnotatedVideo(out, path, 0.5) as drawn:
        for frame in frames(path, fps=2):
            drawn.add(np.ascontiguousarray(frame.image[:63, :95]), frame)  # odd sides
            assert not out.exists()
    got = frames(out, fps=100)
    assert [f.time_s for f in got] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5], abs=0.002)
    assert [index_of(f.image) for f in got] == list(range(0, 40, 5))
    assert got[0].image.shape == (62, 94, 3)
    waveform, rate = read_audio(out)
    assert np.flatnonzero(np.abs(waveform[0]) > 0.1)[0] / rate == pytest.approx(2, abs=0.02)
    assert not list(tmp_path.glob("*.part"))


def test_annotated_video_of_a_late_clock_and_another_rate(tmp_path):
    path = make_video(
        tmp_path / "v.ts", [7 + t for t in TENTHS], audio=tone(3, begin=2, rate=48_000), rate=48_000, audio_start=7
    )
    out = tmp_path / "out.mp4"
    with AnnotatedVideo(out, path, 1) as drawn:
        for frame in frames(path):
            drawn.add(frame.image, frame)
    waveform, rate = read_audio(out)
    assert np.flatnonzero(np.abs(waveform[0]) > 0.1)[0] / rate == pytest.approx(2, abs=0.05)


def test_an_annotated_video_appears_whole_or_not(tmp_path):
    path = make_video(tmp_path / "v.mp4", [0, 0.1])
    out = tmp_path / "out.mp4"
    frame = frames(path)[0]

    def write() -> None:
        with AnnotatedVideo(out, None, 1) as drawn:
            drawn.add(frame.image, frame)
            raise KeyError("something else")

    with pytest.raises(KeyError):
        write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v.mp4"]
    with pytest.raises(VideoWriteError, match=r"out\.mp4: cannot be written"):
        AnnotatedVideo(tmp_path / "nowhere" / "out.mp4", None, 1)


def test_a_full_disk_is_reported_with_what_is_free(tmp_path, monkeypatch):
    path = make_video(tmp_path / "v.mp4", [0, 0.1])
    frame = frames(path)[0]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "v.mp4.part")

    with AnnotatedVideo(tmp_path / "out.mp4", None, 1) as drawn:
        monkeypatch.setattr(drawn, "_begin", full)
        with pytest.raises(VideoWriteError, match=r"out\.mp4: the disk is full \(.* free in "):
            drawn.add(frame.image, frame)


def remuxed(path: Path, out: Path, *, last_s: float, **options) -> Path:
    """The same video, its last frame shown for so many seconds."""
    with av.open(str(path)) as source, av.open(str(out), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(source.streams.video[0]) if packet.dts is not None]
        packets[-1].duration = round(last_s / packets[-1].time_base)
        for packet in packets:
            packet.stream = stream
            target.mux(packet)
    return out


def test_a_whole_video_is_not_called_cut_short(tmp_path):
    """Though frames stand still for long, the last one too, or only a part is asked for."""
    times = [*TENTHS, *(12 + t for t in TENTHS)]
    still = make_video(tmp_path / "still.mp4", times)
    assert [round(f.time_s) for f in frames(still, end=11)] == [0, 1, 2]
    for codec in ("libx264", "mpeg4"):  # the first stores frames in another order
        path = make_video(tmp_path / f"{codec}.mp4", TENTHS, codec=codec)
        last = remuxed(path, tmp_path / "last.mp4", last_s=8)
        with av.open(str(last)) as container:
            assert container.duration > 10 * av.time_base
        assert len(frames(last)) == 3
    matroska = make_video(tmp_path / "v.mkv", [*TENTHS, 12])  # which does not say how long frames are shown
    assert len(frames(matroska, end=11)) == 3


def test_gaps_outside_of_the_span_are_not_reported(tmp_path):
    path = make_video(tmp_path / "v.ts", [i / 10 for i in range(40)] + [10 + i / 10 for i in range(40)], key_every=5)
    lines: list[str] = []
    whole = frames(path, warn=lines.append)
    assert len(lines) == 1
    assert "without frames from 4.0 to 10.0 s" in lines[0]
    assert [f.index for f in frames(path, start=11)] == [f.index for f in whole if f.time_s > 10.9]
    assert frames(path, after=whole[5].index)
    assert frames(path, start=3, end=3.9)


def test_empty_span_is_reported(tmp_path):
    path = make_video(tmp_path / "v.mp4", TENTHS)
    for span, report in (({"start": 10.0}, "from 10 s on"), ({"start": 4.0, "end": 5.0}, "from 4 s to 5 s")):
        lines: list[str] = []
        assert not frames(path, warn=lines.append, **span)
        assert lines == [f"{path}: no frame is shown {report}"]
    assert not frames(path, after=29)  # a run that goes on had all of it


def write_floats(path: Path, audio) -> Path:
    """A WAV file of floats, whatever they are."""
    data = audio.astype("<f4").tobytes()
    head = struct.pack("<4sIHHIIHH4sI", b"fmt ", 16, 3, 1, 16_000, 64_000, 4, 32, b"data", len(data))
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(head) + len(data)) + b"WAVE" + head + data)
    return path


def test_non_finite_audio_is_not_used(tmp_path, counter):
    path, audio = make_video(tmp_path / "v.mp4", [i / 10 for i in range(40)]), tone(4)
    audio[24_000:40_000] = np.nan
    audio[30_000] = np.inf
    lines: list[str] = []
    got = frames(path, audio=write_floats(tmp_path / "s.wav", audio), warn=lines.append)
    assert [f.waveform is not None for f in got] == [True, True, False, True]
    assert all(np.isfinite(f.waveform[0]).all() for f in got if f.waveform is not None)
    assert len(lines) == 1
    assert "the audio is damaged after 1." in lines[0]
    with pytest.raises(AudioError, match="no samples"):
        AudioTrack(write_floats(tmp_path / "n.wav", np.full(16_000, np.nan)), None, lines.append)
    with AnnotatedVideo(tmp_path / "out.mp4", tmp_path / "s.wav", 1) as drawn:
        for frame in got:
            drawn.add(frame.image, frame)
    assert np.isfinite(read_audio(tmp_path / "out.mp4")[0]).all()


def test_unreadable_audio_ends(tmp_path, monkeypatch):
    """A fault at every try is not asked again for ever."""
    path, tries = make_video(tmp_path / "v.mp4", TENTHS, audio=tone(3)), 0

    class Broken(Wrapped):
        def demux(self, stream):
            nonlocal tries
            tries += 1
            assert tries < 1000
            if tries == 1:
                yield from islice(self.container.demux(stream), 20)
            raise av.error.InvalidDataError(1, "broken")

    opened = audio_module.open_media
    monkeypatch.setattr(audio_module, "open_media", lambda *arguments: Broken(opened(*arguments)))
    lines: list[str] = []
    has_audio = [f.waveform is not None for f in frames(path, fps=2, warn=lines.append)]
    assert has_audio == [True, True, True, False, False, False]
    assert len(lines) == 1


def test_what_cannot_be_used_is_not_left_open(tmp_path):
    path = tmp_path / "v.mp4"
    write_audio_only(path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(VideoError, match="no moving frame") as caught:
        frames(path)
    assert caught.tb is not None  # which holds what was open
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_too_large_images(tmp_path, monkeypatch):
    monkeypatch.setattr(container_module, "MAX_PIXELS", 96 * 64 - 1)
    with pytest.raises(VideoError, match=r"v\.mp4: 96×64 is too large"):
        frames(make_video(tmp_path / "v.mp4", [0, 0.1]))


def test_an_annotated_video_that_cannot_be_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "open", lambda *arguments, **options: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(VideoWriteError, match=r"out\.mp4: the disk is full"):
        AnnotatedVideo(tmp_path / "out.mp4", None, 1)
    assert not list(tmp_path.iterdir())


def test_an_endless_annotated_video_can_be_played_as_it_grows(tmp_path):
    path = make_video(tmp_path / "v.mp4", [i / 10 for i in range(40)])
    whole = frames(path, fps=10)
    with AnnotatedVideo(tmp_path / "out.mp4", None, 0.1, endless=True) as drawn:
        for time in range(0, 80, 4):
            for frame in whole:
                drawn.add(frame.image, replace(frame, time_s=time + frame.time_s))
        shutil.copy(tmp_path / "out.mp4.part", tmp_path / "killed.mp4")
    assert 600 < len(frames(tmp_path / "killed.mp4", fps=10, warn=lambda line: None)) < 800
    assert len(frames(tmp_path / "out.mp4", fps=10)) == 800


def test_colours_that_ffmpeg_knows_by_name_alone(tmp_path):
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=10, options={"x264-params": "colormatrix=YCgCo"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        image = av.VideoFrame.from_ndarray(np.full((64, 96, 3), 120, np.uint8), format="rgb24")
        image.pts, image.time_base = 0, Fraction(1, 10)
        container.mux([*video.encode(image), *video.encode()])
    (frame,) = read_frames(path)
    for size in ((96, 64), (48, 32)):
        assert np.abs(frame.scaled(size).astype(int) - 120).max() < 12


def test_frames_starting_after_the_audio_are_not_cut_short(tmp_path):
    """Matroska states the end on its own clock."""
    path = make_video(tmp_path / "v.mkv", [3 + i / 10 for i in range(30)], audio=tone(6))
    lines: list[str] = []
    assert len(list(read_frames(path, Span(10), warn=lines.append))) == 30
    assert lines == []


def test_a_rate_that_is_none():
    with pytest.raises(VideoError, match="cannot be counted"):
        Span(1e308)
