"""Only what is due is decoded, and it is the same frame with the same number wherever decoding began."""

from __future__ import annotations

import math
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from videos import write_moving

from crowdexit.video import decode
from crowdexit.video.container import VideoError, open_file
from crowdexit.video.decode import Due, FrameSampler, Span

KINDS = {
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.ts": {},
    "bframes.avi": {"codec": "mpeg4"},
    "h264.avi": {},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},  # open groups of frames
    "refresh.mkv": {"options": {"x264-params": "intra-refresh=1"}},  # key frames that are none
    "mpeg2.mpg": {"codec": "mpeg2video"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
    "intra.mkv": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "raw.h264": {},
}
SPANS = [
    Span(1000),
    Span(1),
    Span(0.7, after=20),
    Span(7, 1.3, 2.1),
    Span(12.5, 2.52),
    Span(1000, 1.96, 2.0),
    Span(3, after=70),
    Span(25, 0, 0.5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, options in KINDS.items():
        write_moving(folder / name, 80, **options)
    return folder


def everything(path: Path, span: Span) -> list:
    """The same, the long way: all decoded, and what is not due thrown away."""
    due, out, origin = Due(span), [], None
    with av.open(str(path)) as container:
        for index, image in enumerate(container.decode(video=0)):
            stamp = image.time if image.time is not None else index / 25
            origin = stamp if origin is None else origin
            if due(index, stamp - origin):
                out.append((index, stamp - origin, image.to_ndarray(format="rgb24")))
    return out


def taken(video: FrameSampler) -> list:
    out = [(shown.number, shown.time, shown.image.to_ndarray(format="rgb24")) for shown in video]
    video.close()
    return out


@pytest.mark.parametrize("name", [name for name in KINDS if name != "h264.avi"])
def test_same_frames_as_decoding_everything(folder, name):
    for span in SPANS:
        expected, got = everything(folder / name, span), taken(FrameSampler(folder / name, span))
        assert [g[0] for g in got] == [e[0] for e in expected], span
        assert [g[1] for g in got] == pytest.approx([e[1] for e in expected], abs=1e-6)
        assert all(np.array_equal(g[2], e[2]) for g, e in zip(got, expected, strict=True)), span


@pytest.mark.parametrize("name", KINDS)
def test_a_part_is_a_part_of_the_whole(folder, name):
    """Frame numbers and times are those of the whole video."""
    whole = taken(FrameSampler(folder / name, Span(5)))
    part = taken(FrameSampler(folder / name, Span(5, 0.9, 2.3)))
    assert [p[:2] for p in part] == [w[:2] for w in whole if 0.899 <= w[1] < 2.299]
    assert len(part) == 7
    rest = taken(FrameSampler(folder / name, Span(5, after=part[2][0])))
    assert [r[:2] for r in rest] == [w[:2] for w in whole if w[0] > part[2][0]]


def test_what_nothing_depends_on_is_not_decoded(folder, monkeypatch):
    fed = 0

    class Counting:
        """A decoder that counts."""

        def __init__(self, codec):
            object.__setattr__(self, "codec", codec)

        def __getattr__(self, name):
            return getattr(self.codec, name)

        def __setattr__(self, name, value):
            setattr(self.codec, name, value)

        def decode(self, packet):
            nonlocal fed
            fed += packet is not None
            return self.codec.decode(packet)

    made = decode._Planned.__init__

    def init(self, *arguments):
        made(self, *arguments)
        self.codec = Counting(self.codec)

    monkeypatch.setattr(decode._Planned, "__init__", init)
    for span, most in {Span(1000): 80, Span(1): 4, Span(1, 2, 3): 1, Span(1000, after=74): 5}.items():
        fed = 0
        assert taken(FrameSampler(folder / "h264.mp4", span))
        assert fed <= most, span


def test_no_rate_and_no_time():
    for fps in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(VideoError, match="frames a second"):
            Span(fps)
    for start, end in ((2.0, 1.0), (-1.0, 1.0), (1.0, 1.0), (math.nan, 2.0)):
        with pytest.raises(VideoError, match="nothing to count"):
            Span(1, start, end)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "vp9.webm", "hevc.mp4"])
@pytest.mark.parametrize("fps", [25, 1])
def test_damage_in_the_middle_is_stepped_over(tmp_path, name, fps):
    clusters = {"cluster_time_limit": "500"} if name.endswith(("mkv", "webm")) else None
    write_moving(tmp_path / name, 150, size=(320, 240), container_options=clusters, **KINDS[name])
    whole = dict(enumerate(taken(FrameSampler(tmp_path / name, Span(25)))))
    data = bytearray((tmp_path / name).read_bytes())
    begin = len(data) * 45 // 100
    data[begin : begin + len(data) // 10] = np.random.default_rng(1).bytes(len(data) // 10)
    (tmp_path / name).write_bytes(data)
    video = FrameSampler(tmp_path / name, Span(fps))
    got = taken(video)
    times = [time for _, time, _ in got]
    assert times == sorted(set(times))
    assert times[0] == 0
    assert times[-1] == pytest.approx(149 / 25 if fps == 25 else 5.0, abs=0.05)
    if name != "vp9.webm":  # which goes on without noticing
        assert any(a < 3.3 and (b is None or b > 2.6) for a, b in video.gaps)
    if fps == 25:
        missing = {i / 25 for i in range(150)} - {round(25 * t) / 25 for t in times}
        assert 5 < len(missing) < 60
        assert all(any(a - 0.3 < t < b for a, b in video.gaps) for t in missing)
        for _, time, image in got if name != "vp9.webm" else ():  # which shows noise without noticing
            assert np.abs(image.astype(int) - whole[round(time * 25)][2]).mean() < 1


def test_no_other_file_is_opened(folder, tmp_path):
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile '{folder / 'h264.mp4'}'\n")
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{folder / 'h264.ts'}\n#EXT-X-ENDLIST\n"
    )
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(VideoError, match=name):
            open_file(tmp_path / name)


def damaged(path: Path, number: int) -> Path:
    """The same video, one packet of it noise but for its beginning."""
    with av.open(str(path)) as container:
        packet = next(islice(container.demux(video=0), number, None))
        begin, end = packet.pos + 30, packet.pos + packet.size - 10
    data = bytearray(path.read_bytes())
    data[begin:end] = np.random.default_rng(1).bytes(end - begin)
    out = path.with_name("damaged-" + path.name)
    out.write_bytes(data)
    return out


def test_what_was_in_other_threads_is_not_lost_with_what_is_damaged(tmp_path):
    """Decoders with threads tell of damage when they have been given more."""
    write_moving(tmp_path / "v.mkv", 100, key_every=1, size=(320, 240))
    got = [number for number, *_ in taken(FrameSampler(damaged(tmp_path / "v.mkv", 41), Span(25)))]
    assert got == [i for i in range(100) if i != 41]


def test_behind_damage_nothing_piles_up(tmp_path, monkeypatch):
    """Though no key frame follows, and all is lost."""
    write_moving(tmp_path / "v.mkv", 195, key_every=1000, size=(320, 240))
    most, lose = 0, decode._Planned._lose

    def measured(self, packet):
        nonlocal most
        lose(self, packet)
        most = max(most, len(self.pending), len(self.plan), len(self.unfed))

    monkeypatch.setattr(decode._Planned, "_lose", measured)
    video = FrameSampler(damaged(tmp_path / "v.mkv", 41), Span(25))
    assert 35 < len(taken(video)) <= 41
    assert video.gaps[-1][1] is None
    assert 0 < most < 60


def test_group_of_frames_lost_by_a_transport_stream(tmp_path):
    """Whole packets of it, with nothing of them left that could look damaged."""
    write_moving(tmp_path / "v.ts", 150, key_every=15)
    with av.open(str(tmp_path / "v.ts")) as container:
        keys = [packet.pos for packet in container.demux(video=0) if packet.is_keyframe]
    data = (tmp_path / "v.ts").read_bytes()
    (tmp_path / "v.ts").write_bytes(data[: keys[4]] + data[keys[5] :])
    for fps, most in ((25, 135), (1, 6)):
        video = FrameSampler(tmp_path / "v.ts", Span(fps))
        assert most - 2 <= len(taken(video)) <= most
        assert (pytest.approx(60 / 25), pytest.approx(75 / 25)) in video.gaps
        assert all(2.3 < begin < end == 3 for begin, end in video.gaps)


def test_a_damaged_clock_does_not_move_what_comes_after(tmp_path):
    """A cluster of Matroska begins a minute too late, the next one as it should."""
    write_moving(tmp_path / "v.mkv", 80, key_every=10, container_options={"cluster_time_limit": "400"})
    data = bytearray((tmp_path / "v.mkv").read_bytes())
    clusters = [at for at in range(len(data)) if data[at : at + 4] == b"\x1f\x43\xb6\x75"]
    stamp = data.index(b"\xe7\x82", clusters[4]) + 2
    begin = int.from_bytes(data[stamp : stamp + 2], "big") / 1000
    assert begin == 2
    data[stamp : stamp + 2] = b"\xff\xff"
    (tmp_path / "v.mkv").write_bytes(data)
    video = FrameSampler(tmp_path / "v.mkv", Span(25))
    got = list(video)
    video.close()
    assert [shown.time for shown in got[:50]] == pytest.approx([i / 25 for i in range(50)], abs=0.01)
    assert [shown.time for shown in got[-15:]] == pytest.approx([i / 25 for i in range(65, 80)], abs=0.01)
    assert all(1.9 < a <= b < 2.7 for a, b in video.gaps)
    assert any(a < 2.1 and b > 2.4 for a, b in video.gaps)


def test_frame_timed_an_hour_later_is_damaged(tmp_path):
    write_moving(tmp_path / "v.mp4", 80, key_every=10)
    data = bytearray((tmp_path / "v.mp4").read_bytes())
    table = data.index(b"ctts") + 12  # entries of a number of packets and their offset
    data[table + 8 * 20 + 4 : table + 8 * 20 + 8] = (1 << 26).to_bytes(4, "big")
    (tmp_path / "v.mp4").write_bytes(data)
    video = FrameSampler(tmp_path / "v.mp4", Span(25))
    got = list(video)
    video.close()
    assert got[-1].time == pytest.approx(79 / 25)
    missing = set(range(80)) - {round(shown.time * 25) for shown in got}
    assert 1 <= len(missing) <= 10
    assert all(any(a - 0.1 <= i / 25 <= b for a, b in video.gaps) for i in missing)
    assert [shown.number for shown in got if shown.lost]


@pytest.mark.parametrize(("key_every", "until"), [(1000, 199), (30, 179)])
@pytest.mark.parametrize(("name", "codec"), [("v.mkv", "libx264"), ("v.webm", "libvpx-vp9")])
def test_frames_built_from_lost_frames_are_reported(tmp_path, name, codec, key_every, until):
    """Until the next key frame, whether or not the decoder notices."""
    options = {"cpu-used": "8", "deadline": "realtime"} if codec == "libvpx-vp9" else {}
    write_moving(
        tmp_path / name,
        200,
        codec=codec,
        options=options,
        key_every=key_every,
        container_options={"cluster_time_limit": "400"},
    )
    data = (tmp_path / name).read_bytes()
    clusters = [at for at in range(len(data)) if data[at : at + 4] == b"\x1f\x43\xb6\x75"]
    times = []
    for at in clusters:
        stamp = data.index(b"\xe7", at)
        times.append(int.from_bytes(data[stamp + 2 : stamp + 2 + (data[stamp + 1] & 15)], "big") / 1000)
    first = next(at for at, time in zip(clusters, times, strict=True) if time >= 2)
    last = next(at for at, time in zip(clusters, times, strict=True) if time >= 6.4)
    (tmp_path / name).write_bytes(data[:first] + data[last:])
    video = FrameSampler(tmp_path / name, Span(25))
    got = {round(shown.time * 25): shown.behind_hole for shown in video}
    video.close()
    report = {index for index, hole in got.items() if hole is not None}
    assert 155 < min(report) < max(report) == until
    assert all(hole is None or hole[0] < 2.5 < 6 < hole[1] for hole in got.values())
