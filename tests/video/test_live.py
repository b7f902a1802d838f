"""Live sources: the newest frame at each time, what is dropped is counted, what stops is opened again.

No camera stands here: one of FFmpeg's own test frames, at its own pace, takes its place.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from videos import Wrapped, index_of, make_video, moving, tone, write_moving

from crowdexit.errors import OptionError
from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.pipeline import count_frames
from crowdexit.jobs.sources import SourceError, expand
from crowdexit.video import container as container_module
from crowdexit.video import live
from crowdexit.video.container import TooLarge, VideoError
from crowdexit.video.decode import Span
from crowdexit.video.frames import read_frames
from crowdexit.video.live import Address, LiveFrames, address_of

TENTHS = [i / 10 for i in range(25)]


def refuse(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def transport_stream(path: Path, *, times=TENTHS, audio=True, **options) -> bytes:
    """The bytes of a video as it would be broadcast, in groups of five frames."""
    own = tone(times[-1] + 0.1, begin=1) if audio else None
    return make_video(path, times, audio=own, key_every=5, **options).read_bytes()


@contextmanager
def fed(path: Path, data: bytes, seconds: float, *, pause: float = 0.0) -> Iterator[str]:
    """A named pipe into which the bytes are written within that time, with a pause after the first half."""
    os.mkfifo(path)

    def feed() -> None:
        pieces = max(1, round(seconds * 20))
        try:
            with path.open("wb", buffering=0) as pipe:
                for i in range(pieces):
                    pipe.write(data[len(data) * i // pieces : len(data) * (i + 1) // pieces])
                    time.sleep(seconds / pieces + (pause if i == pieces // 2 else 0))
        except BrokenPipeError:
            pass

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    yield str(path)
    thread.join(10)


def frames_of(name: str, fps: float = 10, *, end: float = float("inf"), pause: float = 0.0, warn=refuse):
    """All frames, taken at intervals, and how many were dropped."""
    address = address_of(name)
    assert address is not None
    source, got = LiveFrames(address, Span(fps, end=end), warn), []
    for frame in source:
        got.append(frame)
        time.sleep(pause)
    return got, source.dropped


def test_addresses(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for text, name, url, lasting in [
        ("-", "-", "pipe:0", False),
        ("camera:1", "camera:1", "/dev/video1", True),
        ("/dev/video0", "/dev/video0", "/dev/video0", True),
        ("rtsp://me:secret@10.0.0.1/a@b", "rtsp://10.0.0.1/a@b", "rtsp://me:secret@10.0.0.1/a@b", True),
        ("rtsp://me:p@ss@host/a", "rtsp://host/a", "rtsp://me:p@ss@host/a", True),
        ("http://h/v?user=me&pwd=s3&ch=1", "http://h/v?user=***&pwd=***&ch=1", "http://h/v?user=me&pwd=s3&ch=1", True),
        ("https://x.org/a.ts", "https://x.org/a.ts", "https://x.org/a.ts", True),
        (str(tmp_path / "pipe"), str(tmp_path / "pipe"), str(tmp_path / "pipe"), False),
    ]:
        address = address_of(text)
        assert address is not None
        assert (address.name, address.url, address.lasting) == (name, url, lasting)
        (source,) = expand([text])
        assert (source.kind, source.name) == ("live", name)
    assert address_of("a.mp4") is None
    assert address_of("10:30.mp4") is None
    for text in ("ftp://x/a.mp4", "file:///etc/passwd", "concat://a"):
        with pytest.raises(VideoError, match=r"begins with one of rtsp://"):
            address_of(text)
    with pytest.raises(VideoError, match=r"^ftp://x/a: an address"):
        address_of("ftp://me:secret@x/a")
    assert "file" not in address_of("http://x/").protocols
    with pytest.raises(SourceError, match="counted alone"):
        expand(["camera:0", "camera:1"])


def test_a_pipe_in_real_time_gives_what_the_file_gives(tmp_path):
    """Frames, times and the second of audio around each, though it is half a second late."""
    data = transport_stream(tmp_path / "v.ts")
    expected = list(read_frames(tmp_path / "v.ts", Span(5)))
    with fed(tmp_path / "pipe", data, 2.5) as name:
        got, dropped = frames_of(name, 5)
    assert dropped == 0
    assert [f.index for f in got] == [f.index for f in expected]
    assert [f.time_s for f in got] == pytest.approx([f.time_s for f in expected], abs=0.002)
    assert [index_of(f.image) for f in got] == [index_of(f.image) for f in expected]
    for live_frame, frame in zip(got, expected, strict=True):
        assert (live_frame.waveform is None) == (frame.waveform is None)
        # What lies before the first frame has not been kept.
        begin = max(0, round((0.5 - frame.time_s) * 16_000)) + 400
        assert np.allclose(live_frame.waveform[0][begin:], frame.waveform[0][begin:], atol=0.02)


def test_who_is_slow_gets_the_newest(tmp_path):
    data = transport_stream(tmp_path / "v.ts", audio=False)
    with fed(tmp_path / "pipe", data, 2.5) as name:
        got, dropped = frames_of(name, 10, pause=0.6)
    assert 2 <= len(got) <= 8
    assert len(got) + dropped == 25
    assert [f.index for f in got] == sorted({f.index for f in got})
    assert got[-1].index == 24


def test_a_pipe_that_could_wait_is_not_dropped(tmp_path):
    """A whole file at once: counted at the pace at which it would be seen, if not faster."""
    data = transport_stream(tmp_path / "v.ts", audio=False)
    with fed(tmp_path / "pipe", data, 0.0) as name:
        got, dropped = frames_of(name, 10, pause=0.04)
    assert (len(got), dropped) == (25, 0)


class Station(ThreadingHTTPServer):
    """Broadcasts a video at its own pace; each answer is one of a list: bytes, an error's code."""

    daemon_threads = True

    def __init__(self, answers: list, seconds: float, *, sized: bool = False, missing: int = 0) -> None:
        station = self
        self.asked = 0

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = answers[min(station.asked, len(answers) - 1)]
                station.asked += 1
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "video/mp2t")
                if sized:
                    self.send_header("Content-Length", str(len(answer) + missing))
                self.end_headers()
                try:
                    for i in range(50):
                        self.wfile.write(answer[len(answer) * i // 50 : len(answer) * (i + 1) // 50])
                        time.sleep(seconds / 50)
                except OSError:
                    pass

            def log_message(self, *arguments) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/live.ts"


@pytest.fixture
def quick(monkeypatch) -> None:
    monkeypatch.setattr(live, "_WAITS_S", (0.1, 0.2))


def test_a_source_that_stops_and_comes_back(tmp_path, quick):
    data, got = transport_stream(tmp_path / "v.ts"), []
    station, lines = Station([data, 503, data], 2.5), []
    source = LiveFrames(address_of(station.url), Span(10), lines.append)
    for frame in source:
        got.append(frame)
        if frame.index >= 40:
            source.stop()
    station.shutdown()
    assert station.asked == 3
    assert [f.index for f in got] == sorted({f.index for f in got})
    times = [f.time_s for f in got]
    assert times == sorted(times)
    assert len(lines) == 2
    assert "stopped after 2.4 s; trying again" in lines[0]
    assert "back after" in lines[1]
    assert all(index_of(f.image) == f.index % 25 for f in got)
    assert 2.5 <= next(f.time_s for f in got if f.index >= 25) < 12  # our clock went on
    assert got[-1].waveform is not None


def test_the_end_comes_while_the_source_is_away(tmp_path, quick):
    station = Station([transport_stream(tmp_path / "v.ts"), 503], 2.5)
    begun, lines = time.monotonic(), []
    got, _ = frames_of(station.url, 10, end=3.5, warn=lines.append)
    station.shutdown()
    assert 5 <= len(got) <= 25
    assert time.monotonic() - begun < 10
    assert len(lines) == 1


def test_a_file_behind_an_address_ends(tmp_path):
    station = Station([transport_stream(tmp_path / "v.ts", times=TENTHS[:10])], 0.0, sized=True)
    got, dropped = frames_of(station.url)
    station.shutdown()
    assert len(got) + dropped == 10


def test_what_cannot_be_opened_is_said_at_once(tmp_path, quick):
    station = Station([404], 0.0)
    for name, line in {
        station.url: "cannot be opened",
        "http://127.0.0.1:9/": "cannot be opened",
        "camera:77": "camera:77: cannot be opened",
    }.items():
        with pytest.raises(VideoError, match=line) as caught:
            frames_of(name)
        assert "\n" not in str(caught.value)
    station.shutdown()
    with fed(tmp_path / "pipe", b"no video at all" * 1000, 0.0) as name, pytest.raises(VideoError, match="pipe"):
        frames_of(name)


def test_a_camera():
    """A camera gives its frames for ever, at its own pace, without audio."""
    if "lavfi" not in av.formats_available:
        pytest.skip("this FFmpeg has no test frames")
    address = Address("camera:0", "testsrc2=size=96x64:rate=20,realtime", "", format="lavfi")
    begun = time.monotonic()
    got = list(LiveFrames(address, Span(5, end=1.5), refuse))
    assert time.monotonic() - begun > 1.2
    assert 4 <= len(got) <= 8
    assert all(f.waveform is None for f in got)
    assert got[0].image.shape == (64, 96, 3)


def test_slow_decoding_drops_frames(tmp_path, monkeypatch):
    """Groups of frames are passed over until the newest is reached again."""
    data = transport_stream(tmp_path / "v.ts", audio=False)
    for name, value in (("_BEHIND_S", 0.3), ("_LONG_S", 0.0), ("_MOST_STAMPS", 8)):
        monkeypatch.setattr(live, name, value)
    lines: list[str] = []
    see, slow = live._Session._queue, 0

    def slowly(self, image):
        nonlocal slow
        slow += 1
        if slow < 4:
            time.sleep(0.4)
        see(self, image)

    monkeypatch.setattr(live._Session, "_queue", slowly)
    with fed(tmp_path / "pipe", data, 2.5) as name:
        address = address_of(name)
        source = LiveFrames(Address(name, address.url, address.protocols), Span(10, end=2.35), lines.append)
        got = list(source)
    assert 6 <= slow <= 20  # of all that came out of the decoder
    assert source.dropped >= 3
    assert [line for line in lines if "decoding is too slow" in line] == [
        f"{name}: decoding is too slow here; frames are skipped"
    ]
    assert got[-1].time_s > 1.9
    assert [index_of(f.image) for f in got] == [f.index for f in got]


def test_rows_of_a_live_source(tmp_path, counter, capsys):
    data = transport_stream(tmp_path / "v.ts")
    out, drawn = tmp_path / "rows.json", tmp_path / "drawn.mp4"
    with fed(tmp_path / "pipe", data, 2.5) as name:
        rows = count_inputs(counter, [name], CountOptions(fps=5, format="json", out=out, annotate=drawn))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == rows
    assert {line["source"] for line in lines} == {name}
    err = capsys.readouterr().err
    assert err.splitlines()[-1] == f"{name}: {rows} frames counted, {13 - rows} dropped"
    assert len(list(read_frames(drawn, Span(100)))) == rows


def test_a_slow_network_counts_what_is_new(tmp_path, counter, monkeypatch):
    """No frame waits for its turn: each is hardly older than the time that counting it took."""
    data, ages = transport_stream(tmp_path / "v.ts", times=[i / 10 for i in range(40)], audio=False), []
    answers, took = type(counter).answers, []

    def slow(self, *arguments, **options):
        begun = time.monotonic()
        time.sleep(0.7)
        counted = answers(self, *arguments, **options)
        took.append(time.monotonic() - begun)
        return counted

    monkeypatch.setattr(type(counter), "answers", slow)
    with fed(tmp_path / "pipe", data, 4.0) as name:
        source = LiveFrames(address_of(name), Span(10), refuse)
        for frame, _ in count_frames(counter, source, name, CountOptions(batch=1)):
            ages.append(source._time - frame.time_s)
    assert len(ages) + source.dropped == 40
    assert max(age - counting for age, counting in zip(ages, took, strict=True)) < 0.7  # it has not stood in a queue


@pytest.fixture
def tests_outlive_sigterm() -> Iterator[None]:
    """One that nobody handles fails a test, rather than end them all."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("tests_outlive_sigterm")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_a_live_source_leaves_whole_files(tmp_path, counter, monkeypatch, capsys, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    data = transport_stream(tmp_path / "v.ts")
    out, drawn = tmp_path / "rows.csv", tmp_path / "drawn.mp4"
    answers, left = type(counter).answers, 3

    def interrupted(self, *arguments, **options):
        nonlocal left
        left -= 1
        if left == 0:
            signal.raise_signal(number)
        return answers(self, *arguments, **options)

    monkeypatch.setattr(type(counter), "answers", interrupted)
    with fed(tmp_path / "pipe", data, 2.5) as name, pytest.raises((KeyboardInterrupt, SystemExit)) as ended:
        count_inputs(counter, [name], CountOptions(fps=10, format="csv", out=out, annotate=drawn))
    assert ended.type is KeyboardInterrupt if number == signal.SIGINT else ended.value.code == 143
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    rows = len(out.read_text().splitlines()) - 1
    assert rows == 3  # what was being counted is written
    assert len(list(read_frames(drawn, Span(100)))) == rows
    assert f"{rows} frames counted" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["drawn.mp4", "pipe", "rows.csv", "v.ts"]


def test_what_a_live_source_cannot_do(tmp_path, counter, capsys):
    for options, line in [
        ({"start": 1.0}, "begins now"),
        ({"audio": Path("a.wav")}, "a live source"),
        ({"resume": True, "format": "csv", "out": tmp_path / "o"}, "only rows of files"),
        ({"annotate": Path("a.avi")}, r"of a live source this ends in \.mp4"),
    ]:
        with pytest.raises(OptionError, match=line):
            count_inputs(counter, ["camera:0"], CountOptions(**options))


def lasting(name: str) -> Address:
    """A pipe as if it were a camera, which gives its frames when they show."""
    address = address_of(name)
    assert address is not None
    return Address(name, address.url, address.protocols)


def test_a_source_that_becomes_later_is_not_left_out(tmp_path, monkeypatch):
    """It is not our decoding that is behind."""
    monkeypatch.setattr(live, "_BEHIND_S", 0.3)
    monkeypatch.setattr(live, "_WAITS_S", (60.0,))  # the pipe is not opened again
    data = transport_stream(tmp_path / "v.ts", times=[i / 20 for i in range(120)], audio=False)
    see, seen = live._Session._queue, 0

    def counted(self, image):
        nonlocal seen
        seen += 1
        see(self, image)

    monkeypatch.setattr(live._Session, "_queue", counted)
    with fed(tmp_path / "pipe", data, 6.0, pause=1.2) as name:
        got = list(LiveFrames(lasting(name), Span(10, end=8), lambda line: None))
    assert got[-1].index >= 115
    assert seen >= 115


@pytest.mark.parametrize("paced", [False, True])
def test_a_clock_that_is_set_anew(tmp_path, monkeypatch, paced):
    """Files joined in a pipe, or a camera that is set: forward by an hour and back again."""
    monkeypatch.setattr(live, "_WAITS_S", (60.0,))
    times = TENTHS[:15]
    first = transport_stream(tmp_path / "a.ts", times=times)
    audio = tone(1.6)
    later = make_video(tmp_path / "b.ts", [3600 + t for t in times], audio=audio, audio_start=3600, key_every=5)
    data, lines = first + later.read_bytes() + first, list[str]()
    with fed(tmp_path / "pipe", data, 4.5 if paced else 0.5) as name:
        address = lasting(name) if paced else address_of(name)
        got = list(LiveFrames(address, Span(10, end=4.4), lines.append))
    steps = np.diff([f.time_s for f in got])
    assert (steps > 0).all()
    assert steps.max() < 1.5
    assert got[-1].time_s < 5
    assert {index_of(f.image) for f in got[-5:]} < set(range(15))
    assert len(got) >= (25 if paced else 42)
    assert sum(f.waveform is not None for f in got if f.time_s > 3.2) >= 3


def test_broken_stream_is_reported(tmp_path):
    data = make_video(tmp_path / "v.mkv", TENTHS, codec="mpeg4", key_every=1).read_bytes()
    lines: list[str] = []
    with fed(tmp_path / "pipe", data[: len(data) // 2], 0.0) as name:
        got, _ = frames_of(name, warn=lines.append)
    assert 5 < len(got) < 20
    assert len(lines) == 1
    assert lines[0].startswith(f"{name}: damaged or broken off after {got[-1].time_s:.1f} s")
    station = Station([transport_stream(tmp_path / "v.ts", audio=False)], 0.0, sized=True, missing=100_000)
    got, dropped = frames_of(station.url, warn=lines.append)
    station.shutdown()
    assert len(got) + dropped >= 24
    assert len(lines) == 2
    assert "damaged or broken off after 2." in lines[1]


def test_a_whole_pipe_is_not_called_broken_off(tmp_path):
    """Though the decoder holds its last frames until the end."""
    data = make_video(tmp_path / "v.mkv", list(range(12))).read_bytes()
    with fed(tmp_path / "pipe", data, 0.0) as name:
        got = [frame.index for frame in frames_of(name, 1)[0]]
    assert got == list(range(12))


def test_behind_damage_in_a_pipe_counting_goes_on(tmp_path, monkeypatch):
    """Whatever FFmpeg makes of it, reading is tried again."""
    data, opened, tries = transport_stream(tmp_path / "v.ts", audio=False), LiveFrames._open, 0

    class Broken(Wrapped):
        def demux(self, *streams):
            nonlocal tries
            tries += 1
            if tries < 4:
                yield from islice(self.container.demux(*streams), 5)
                raise av.error.InvalidDataError(1, "broken")
            yield from self.container.demux(*streams)

    monkeypatch.setattr(LiveFrames, "_open", lambda self: Broken(opened(self)))
    lines: list[str] = []
    with fed(tmp_path / "pipe", data, 0.0) as name:
        got, _ = frames_of(name, warn=lines.append)
    assert [f.index for f in got] == list(range(25))
    assert len(lines) == 1
    assert lines[0].startswith(f"{name}: damaged or broken off after 0.")


@pytest.mark.parametrize("ended", [True, False])
def test_a_list_of_pieces_is_a_file_when_it_is_ended(tmp_path, quick, monkeypatch, ended):
    monkeypatch.setattr(live, "_TIMEOUT_S", 2.0)
    piece = transport_stream(tmp_path / "v.ts", audio=False)
    text = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:1\n#EXTINF:2.5,\npiece.ts\n" + "#EXT-X-ENDLIST\n" * ended

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = piece if self.path.endswith(".ts") else text.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments) -> None:
            pass

    server, lines = ThreadingHTTPServer(("127.0.0.1", 0), Handler), list[str]()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = LiveFrames(
        address_of(f"http://127.0.0.1:{server.server_address[1]}/live.m3u8"), Span(10, end=20), lines.append
    )
    got = []
    for frame in source:
        got.append(frame)
        if frame.index >= 30:
            source.stop()
    server.shutdown()
    assert sum(f.index < 25 for f in got) >= 15  # it waits, where the pieces come sooner than they are seen
    assert bool(lines) != ended
    if not ended:
        assert "trying again" in lines[0]
        assert got[-1].index >= 30


def test_what_is_held_at_the_end_is_dropped(tmp_path):
    data, got = transport_stream(tmp_path / "v.ts"), []
    with fed(tmp_path / "pipe", data, 0.0) as name:
        source = LiveFrames(address_of(name), Span(10), refuse)
        for frame in source:
            got.append(frame)
            if len(got) == 3:
                source.stop()
    assert source.dropped >= 4  # those that wait for half a second of audio
    assert len(got) + source.dropped == source._index + 1


def test_live_frames_that_are_too_large(tmp_path, monkeypatch):
    data = transport_stream(tmp_path / "v.ts", audio=False)
    with monkeypatch.context() as patch, fed(tmp_path / "pipe", data, 0.0) as name:
        patch.setattr(container_module, "MAX_PIXELS", 96 * 64 - 1)
        with pytest.raises(VideoError, match="pipe: 96×64 is too large"):
            frames_of(name)
    seen = 0

    def grown(name: str, width: int, height: int) -> None:
        nonlocal seen
        seen += 1
        if seen > 5:
            raise TooLarge(f"{name}: too large")

    monkeypatch.setattr(live, "check_size", grown)
    with fed(tmp_path / "again", data, 0.0) as name, pytest.raises(VideoError, match="again: too large"):
        frames_of(name)
    assert seen == 6


def test_frames_after_damage_do_not_use_lost_frames(tmp_path):
    """A broadcast with a hole in it: nothing is counted there, and that is reported."""
    write_moving(tmp_path / "v.ts", 100, size=(320, 240))
    data = bytearray((tmp_path / "v.ts").read_bytes())
    data[len(data) * 30 // 100 : len(data) * 60 // 100] = bytes(len(data) * 60 // 100 - len(data) * 30 // 100)
    lines: list[str] = []
    with fed(tmp_path / "pipe", bytes(data), 0.0) as name:
        got, _ = frames_of(name, 1000, warn=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f"{name}: damaged from ")
    begin = float(lines[0].partition("damaged from ")[2].split()[0])
    # Each is what was shown at its time; but the one in which the hole begins is cut, and out before that is known.
    for frame in (frame for frame in got if abs(frame.time_s - begin) > 0.1):
        shown = moving(round(frame.time_s * 25), (320, 240))
        assert np.abs(frame.image.astype(int) - shown).mean() < 12
    assert 30 < len(got) < 80


def test_end_of_a_pipe_without_data(tmp_path):
    data = transport_stream(tmp_path / "v.ts", audio=False)
    os.mkfifo(tmp_path / "pipe")
    silence = threading.Event()

    def feed() -> None:
        with (tmp_path / "pipe").open("wb", buffering=0) as pipe:
            pipe.write(data)
            silence.wait(60)

    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    begun = time.monotonic()
    try:
        frames = list(LiveFrames(address_of(str(tmp_path / "pipe")), Span(10, end=4), refuse))
        assert time.monotonic() - begun < 30
        assert frames
    finally:
        silence.set()
        thread.join()
    os.mkfifo(tmp_path / "nobody")
    with pytest.raises(VideoError, match="no frame arrived before the end"):
        list(LiveFrames(address_of(str(tmp_path / "nobody")), Span(10, end=0.5), refuse))


def test_schemes_are_the_same_in_capitals():
    assert address_of("HTTP://Example.org/A").url == "http://Example.org/A"
