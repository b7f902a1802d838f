"""Read live frames of a camera, stream or pipe; frames that cannot be counted in time are dropped."""

from __future__ import annotations

import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from time import monotonic
from typing import Any

import av
from av.format import Flags

from crowdexit.data.audio import Converter, Warn
from crowdexit.data.media import FAULTS, MOST_FAULTS, PLAYLISTS
from crowdexit.video.audio import AudioWindow, Places, usable
from crowdexit.video.container import (
    TooLarge,
    VideoError,
    check_size,
    nominal_step,
    read_only,
    stated_length,
    video_stream,
)
from crowdexit.video.decode import HOLE_S, Due, Span
from crowdexit.video.display import StreamDisplay
from crowdexit.video.frames import Frame

# What an address may lead to: never to a file, nor from one network to another kind.
_RTSP, _HTTP = "rtsp,rtsps,rtp,srtp,udp,tcp,tls", "http,https,httpproxy,tcp,tls,crypto"
_PROTOCOLS = {"rtsp": _RTSP, "rtsps": _RTSP, "http": _HTTP, "https": _HTTP}
_TIMEOUT_S = 10.0  # without a packet, until a source counts as gone
_WAITS_S = (1.0, 2.0, 5.0, 10.0, 30.0)  # between one try to open a source again and the next
_PROBE_MICROSECONDS = 1_000_000  # of the source, to find out what it is
_AUDIO_S = 0.5  # that a frame waits for, and no longer than
_MORE_S = 0.1  # at most, for it to come
_BEHIND_S = 1.0  # by which decoding may fall behind the source before it leaves frames out
_DRIFT = 1e-3  # by which the source's clock may be slower than ours while nothing is waited for
_IDLE_SHARE, _IDLE_S = 0.1, 0.05  # who waits for more than this share of the time, and for so long, is not behind
_LONG_S = 10.0  # of leaving out, until it is reported
_BACK_S, _AHEAD_S = 1.0, 60.0  # by which stamps may leap before the source's clock counts as set anew
_MOST_STAMPS = 512
_AUDIO_HELD_S = 3.0
_PATIENCE_S = 1.0  # for the reading to end
_MOST_WITHOUT_KEY = 300  # packets behind damage, until what is refreshed bit by bit is believed again
_SUSPECT = 4  # packets before one of which others may be missing, from a corrupt one on
_MAX_REPORTED = 5  # of places where frames are lost
_MOST_EARLY = 200  # blocks, some milliseconds each
_MOST_BYTES = 2**28  # of frames that wait for their audio
# What may be a part of an address that lets its reader in.
_SECRETS = r"(?i)([^?&;/=]*(?:user|usr|login|pass|pwd|psw|token|key|auth|secret|sig)[^?&;/=]*=)[^&;#/]*"


@dataclass(frozen=True)
class Address:
    """How a live source is opened.

    Attributes:
        name: as shown and stored, without a password.
        url: for FFmpeg. format: of a device, its kind. protocols: those that FFmpeg may use for it.
        lasting: whether to reconnect after it has stopped (not for pipes).
    """

    name: str
    url: str
    protocols: str
    format: str | None = None
    lasting: bool = True


def address_of(text: str) -> Address | None:
    """The live source of that name: ``-``, ``camera:0``, ``rtsp://…``, ``http://…``, a named pipe; None: none.

    Raises:
        VideoError: for an unsupported kind of address.
    """
    if text == "-":
        return Address("-", "pipe:0", "pipe", lasting=False)
    if match := re.fullmatch(r"(?:camera:|/dev/video)(\d+)", text):
        return Address(text, f"/dev/video{match[1]}", "file", format="video4linux2")
    if match := re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", text):
        name = re.sub(_SECRETS, r"\1***", re.sub(r"(?<=://)[^/?#]*@", "", text))
        scheme = match[1].lower()
        if scheme not in _PROTOCOLS:
            raise VideoError(f"{name}: an address begins with one of {', '.join(f'{p}://' for p in _PROTOCOLS)}")
        return Address(name, scheme + text[len(scheme) :], _PROTOCOLS[scheme])
    if Path(text).is_fifo():
        return Address(text, str(Path(text).absolute()), "file", lasting=False)
    return None


class LiveFrames:
    """Iterate over a live source's newest frames; a separate thread reads them.

    A frame waits half a second for the audio after it. A newer frame replaces one that was not yet taken. A pipe, or a
    file behind an address, that delivers frames faster than real time is throttled instead. A source that stops is
    reopened, after increasing pauses.

    Args:
        span: which frames; ``end`` by the source's clock or ours, whichever is first.
        warn: called with one line when the source stops and when it returns.

    Attributes:
        dropped: number of due frames that were dropped.

    Raises:
        VideoError: if it cannot be opened at first, cannot be read, or delivers nothing before ``end``.
    """

    def __init__(self, address: Address, span: Span, warn: Warn) -> None:
        self.address, self.dropped = address, 0
        self._span, self._due, self._warn = span, Due(span), warn
        self._changed = threading.Condition()
        self._newest: Frame | None = None
        self._stopped, self._ended = threading.Event(), False
        self._fault: BaseException | None = None
        self._begun: float | None = None  # the first frame, on our clock
        self._index, self._time = -1, 0.0  # of the last frame read
        self._reported_slow, self._reported_lost, self._reported_unusable = False, 0, False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __iter__(self) -> Iterator[Frame]:
        self._thread.start()
        requested_at = monotonic()
        while True:
            with self._changed:
                # Reading ends by itself with the span, unless the source has fallen silent.
                since = requested_at if self._begun is None else self._begun
                left = since + self._span.end + _AUDIO_S + _PATIENCE_S - monotonic()
                come = self._changed.wait_for(
                    lambda: self._newest is not None or self._ended or self._stopped.is_set(),
                    None if left > threading.TIMEOUT_MAX else max(0.0, left),
                )
                if not come and self._begun is None:
                    self._stopped.set()
                    raise VideoError(f"{self.address.name}: no frame arrived before the end")
                if not come:
                    self._stopped.set()
                frame, self._newest = self._newest, None
                self._changed.notify_all()
            if frame is None or self._stopped.is_set():
                break
            yield frame
        if self._stopped.is_set():
            self._thread.join(_PATIENCE_S)  # what it still holds is dropped
            self.dropped += frame is not None
        elif self._fault is not None:
            raise self._fault

    def stop(self) -> None:
        """Stop, from any thread; does not wait for a blocked source."""
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            self._follow()
        except BaseException as error:
            self._fault = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _follow(self) -> None:
        tries, gone, form = 0, False, ""
        while not self._over():
            before, lasting = self._index, self.address.lasting
            broken: float | None = None
            try:
                with self._open() as container:
                    form = container.format.name
                    listed = bool(PLAYLISTS & set(form.split(",")))  # comes in pieces of seconds
                    # What has a size is a file; a list of files is one if it knows how long they are.
                    whole = (container.duration or 0) > av.time_base if listed else container.size > 0
                    lasting = lasting and not whole
                    broken = _Session(self, container, paced=lasting and not listed).read()
            except TooLarge:
                raise
            except VideoError:
                if self._begun is None:
                    raise
            if self._begun is None:
                comes = not self.address.lasting or "mp4" in form
                hint = " (an MP4 can only be streamed with its index in front)" if comes else ""
                raise VideoError(f"{self.address.name}: no frame can be read of it{hint}")
            if not lasting or self._over():
                if broken is not None:
                    self._warn(f"{self.address.name}: damaged or broken off after {broken:.1f} s")
                return
            if self._index > before or not gone:
                tries, gone = 0, True
                self._warn(f"{self.address.name}: stopped after {self._time:.1f} s; trying again")
            wait = _WAITS_S[min(tries, len(_WAITS_S) - 1)]
            tries += 1
            self._stopped.wait(max(0.0, min(wait, self._span.end - self._elapsed())))

    def _open(self) -> Any:
        options = {"protocol_whitelist": self.address.protocols, "analyzeduration": str(_PROBE_MICROSECONDS)}
        if self.address.url.startswith("rtsp"):
            options["rtsp_flags"] = "prefer_tcp"
        try:
            return av.open(
                self.address.url,
                format=self.address.format,
                container_options=options,
                metadata_errors="replace",
                timeout=_TIMEOUT_S,
            )
        except (*FAULTS, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise VideoError(f"{self.address.name}: cannot be opened ({reason})") from None

    def _elapsed(self) -> float:
        """Seconds since the first frame, on our clock."""
        return 0.0 if self._begun is None else monotonic() - self._begun

    def lost(self, begin: float, end: float) -> None:
        """Report that there are no frames between two times."""
        self._reported_lost += 1
        if self._reported_lost <= _MAX_REPORTED:
            rest = "; further damage is not reported" if self._reported_lost == _MAX_REPORTED else ""
            self._warn(f"{self.address.name}: damaged from {begin:.1f} to {end:.1f} s; nothing is counted there{rest}")

    def _over(self) -> bool:
        return self._stopped.is_set() or max(self._time, self._elapsed()) >= self._span.end

    def _image(self, time: float | None, skipped: int) -> tuple[int, float]:
        """The index and time of the next frame after some skipped ones; without a time, now."""
        self._index += 1 + skipped
        self._time = max(self._time, self._elapsed() if time is None else time)
        return self._index, self._time

    def _hand(self, frame: Frame, *, paced: bool) -> None:
        """Hand over a frame, replacing one that was not taken."""
        with self._changed:
            early = frame.time_s - self._elapsed()
            if not paced and early > 0:
                self._changed.wait_for(lambda: self._newest is None or self._stopped.is_set(), early)
            if self._stopped.is_set():
                self.dropped += 1
                return
            self.dropped += self._newest is not None
            self._newest = frame
            self._changed.notify_all()


class _Session:
    """One connection to a live source.

    Args:
        paced: whether it delivers frames in real time and does not wait.
    """

    def __init__(self, live: LiveFrames, container: Any, *, paced: bool) -> None:
        self.live, self.container, self.paced = live, container, paced
        self.video = video_stream(container, live.address.name, "SLICE")  # frames decoded abreast come late
        self.display = StreamDisplay(self.video)
        self.audio_stream = next((s for s in container.streams.audio if s.codec_context is not None and s.rate), None)
        read_only(container, *self._streams())
        self.origin: float | None = None  # the first frame on the source's clock
        self.timed = not container.format.flags & Flags.no_timestamps.value  # else FFmpeg makes them up
        self.shift: float | None = None  # from the source's clock to seconds since the first frame of all
        self.audio_window: AudioWindow | None = None
        self.early: deque[Any] = deque(maxlen=_MOST_EARLY)  # blocks of audio from before the first frame
        self.waiting: deque[Frame] = deque()  # for their audio
        self.stamps: list[int] = []  # a heap: of the packets whose frames have not come out
        self.passed = 0  # and of those that were let go of
        self.least, self.requested_at, self.last_frame_at = float("inf"), monotonic(), monotonic()
        self.idle, self.new = 0.0, False  # how long packets were waited for, of late; whether the last ones were
        self.leaving_out, self.since = False, 0.0
        self.blind, self.without_key = False, 0  # from damage to the next key frame; packets since
        self.lost_from: float | None = None  # the last good frame before damage, until another comes
        self.lost: tuple[float, float] | None = None  # where frames are damaged since the last frame
        self.entry: int | None = None  # the stamp of the last key frame that decoding began with anew
        self.suspect, self.stored = 0, None  # packets behind a corrupt one to look at; when the last was stored

    def _streams(self) -> list[Any]:
        return [self.video] if self.audio_stream is None else [self.video, self.audio_stream]

    def read(self) -> float | None:
        """Read to the end of it.

        Returns:
            When the first fault came, or the end before it was due; None: neither.
        """
        packets, faults, broken, ended = self.container.demux(*self._streams()), 0, None, False
        # Behind what is damaged in a pipe more may come, as in a file; a connection that is gone is gone.
        most = 0 if self.live.address.lasting else MOST_FAULTS
        while faults <= most and not self.live._over():
            requested_at = monotonic()
            try:
                packet = next(packets)
            except StopIteration:
                ended = True
                break
            except (*FAULTS, OSError):
                faults, broken = faults + 1, self.live._time if broken is None else broken
                packets = self.container.demux(*self._streams())
                continue
            faults = 0
            self._waited(requested_at)
            if packet.size:  # else a repetition of the frame before, or the end
                self._take(packet)
        with suppress(*FAULTS):
            for image in () if self.blind else self.video.codec_context.decode(None):
                self._take_frame(image)
        broken = self.lost_from if broken is None else broken
        # Of what has a size the length may only be estimated.
        stated = 0.0 if self.live.address.lasting else stated_length(self.container, self.video, self.origin)
        if ended and broken is None and self.live._time < stated - 0.5 - nominal_step(self.video):
            broken = self.live._time
        while self.waiting:
            self._hand()
        return broken

    def _waited(self, requested_at: float) -> None:
        """Record a packet that was requested at a time; if reading had to wait, nothing is buffered before it."""
        now = monotonic()
        self.idle = max(0.0, self.idle + now - requested_at - _IDLE_SHARE * (now - self.requested_at))
        self.requested_at = now
        if self.idle >= _IDLE_S:
            self.idle, self.new = 0.0, True

    def _take(self, packet: Any) -> None:
        if packet.stream is self.audio_stream:
            with suppress(*FAULTS):  # one damaged packet is not the end
                for block in packet.decode():
                    self._add_audio(block)
        elif not self._left_out(packet):
            self._decode_frames(packet)
        while self.waiting and (self.audio_window is None or self._audio_complete(self.waiting[0].time_s)):
            self._hand()

    def _decode_frames(self, packet: Any) -> None:
        """Decode a packet of frames; after damage, none before the next key frame."""
        if self._torn_before(packet) and not self.blind:
            with suppress(*FAULTS):  # what came before is whole
                all(map(self._take_frame, self.video.codec_context.decode(None)))
            self._lose()
        if self.blind:
            self.without_key += 1
            if not packet.is_keyframe and self.without_key <= _MOST_WITHOUT_KEY:
                return
            self.video.codec_context.flush_buffers()
            self.blind, self.without_key, self.entry = False, 0, packet.pts
        with suppress(*FAULTS):
            if all(map(self._take_frame, packet.decode())):
                return
        self._lose()

    def _torn_before(self, packet: Any) -> bool:
        """Whether packets are missing before this one.

        About there one counts as corrupt. So it does where streams are joined, but then the clock goes on, or is anew.
        """
        self.suspect = _SUSPECT if packet.is_corrupt else max(0, self.suspect - 1)
        before, self.stored = self.stored, packet.dts
        if not self.suspect or self.shift is None or before is None or packet.dts is None:
            return False
        gap, time = float((packet.dts - before) * packet.time_base), float(packet.dts * packet.time_base)
        return gap > 1.5 * nominal_step(self.video) and not self._leaps(time + self.shift)

    def _lose(self) -> None:
        """Skip until the next key frame."""
        self.blind = True
        if self.lost_from is None and self.shift is not None:  # else there has been nothing to lose
            self.lost_from = self.live._time

    def _take_frame(self, image: Any) -> bool:
        """Check a decoded frame; False if it is damaged."""
        if not image.is_corrupt:
            self._queue(image)
            return True
        # Shown before the key frame that decoding has begun with anew, and made from what was lost.
        return self.entry is not None and image.pts is not None and image.pts < self.entry

    def _audio_complete(self, time: float) -> bool:
        """Whether the audio around a time has arrived, or will not."""
        assert self.audio_window is not None
        return self.audio_window.end >= time + _AUDIO_S or self.live._time >= time + _AUDIO_S + _MORE_S

    def _queue(self, image: Any) -> None:
        live = self.live
        display = self.display.of(image)
        check_size(live.address.name, *display.size(image.width, image.height))
        stamp = float(image.pts * self.video.time_base) if self.timed and image.pts is not None else None
        if live._begun is None:
            live._begun = monotonic()
        if self.shift is None:
            self.origin = stamp
        shift = self.shift
        if shift is None or (stamp is not None and self._leaps(stamp + shift)):
            shift = self._anchor(stamp or 0.0)
        skipped, self.passed = self.passed, 0
        while self.stamps and image.pts is not None and self.stamps[0] <= image.pts:
            skipped += heappop(self.stamps) < image.pts
        before = live._time
        index, time = live._image(None if stamp is None else stamp + shift, skipped)
        if self.lost_from is not None:
            live.lost(self.lost_from, time)
            self.lost = (self.lost_from if self.lost is None else self.lost[0], time)
            self.lost_from = None
        elif not live.address.lasting and index > 0 and time - before > max(HOLE_S, 2 / live._span.fps):
            live.lost(before, time)  # most formats do not tell where packets are missing
        if live._due(index, time):
            held = sum(plane.buffer_size for plane in image.planes) * (len(self.waiting) + 1)
            if self.waiting and held > _MOST_BYTES:
                live.dropped += 1
            else:
                self.waiting.append(Frame(index, time, image, None, None, display, self.lost))
                self.lost = None

    def _leaps(self, time: float) -> bool:
        """Whether the source's clock was reset, judged by a time stamp."""
        live = self.live
        return time < live._time - _BACK_S or time > max(live._time, live._elapsed()) + _AHEAD_S

    def _anchor(self, stamp: float) -> float:
        """Take a stamp on the source's clock for now, or for the next after the last one; the shift to there."""
        live, first, now = self.live, self.shift is None, max(self.live._elapsed(), self.live._time)
        while self.waiting:
            self._hand()  # with the audio by the clock before
        if first and live._index >= 0:
            live._warn(f"{live.address.name}: back after {now - live._time:.1f} s")
        # One that is made to wait has not gone on with our clock.
        self.shift = (now if first or self.paced else live._time + nominal_step(self.video)) - stamp
        if self.audio_stream is not None:
            self.place = Places(self.audio_stream.rate, -self.shift, continues=False)
            self.convert = Converter(self.audio_stream.rate)
            self.audio_window = AudioWindow(self.audio_stream.rate, held_s=_AUDIO_HELD_S)
            while self.early:
                self._add_audio(self.early.popleft())
        return self.shift

    def _add_audio(self, block: Any) -> None:
        if self.audio_window is None:
            self.early.append(block)
            return
        for even in self.convert(block):
            start, samples = self.place(even)
            # What is still on a clock that has been set back would never be let go of.
            known = start < (max(self.live._time, self.live._elapsed()) + _AHEAD_S) * self.audio_window.rate
            if not usable(samples):
                if not self.live._reported_unusable:
                    self.live._reported_unusable = True
                    self.live._warn(f"{self.live.address.name}: audio with unusable values is skipped")
            elif known:
                self.audio_window.add(start, samples)

    def _hand(self) -> None:
        frame = self.waiting.popleft()
        second = None if self.audio_window is None else self.audio_window.second_around(frame.time_s)
        self.live._hand(replace(frame, waveform=second), paced=self.paced)

    def _left_out(self, packet: Any) -> bool:
        """Whether decoding has fallen behind, and not reached a key frame since."""
        if packet.stream is self.audio_stream or packet.pts is None or not self.timed:
            return False
        if self.shift is not None or packet.is_keyframe or self.stamps:  # from the first one that can be decoded on
            heappush(self.stamps, packet.pts)
        if len(self.stamps) > _MOST_STAMPS:
            heappop(self.stamps)
            self.passed += 1
        if not self.paced:
            return False
        now, time = monotonic(), float((packet.pts if packet.dts is None else packet.dts) * packet.time_base)
        # The least time that a packet has taken to us is that of one which had not to wait. By a minute more than that
        # a clock was set, for nothing on the way holds so much.
        if self.new or now - time - self.least > _AHEAD_S:
            self.least = now - time
        self.least = min(now - time, self.least + _DRIFT * (now - self.last_frame_at))
        self.last_frame_at, self.new = now, False
        behind = now - time - self.least > _BEHIND_S
        if self.leaving_out and packet.is_keyframe and not behind:
            self.leaving_out = False
            self.video.codec_context.flush_buffers()
        elif behind and self.shift is not None and not self.leaving_out:
            self.leaving_out, self.since = True, now
        if self.leaving_out and self.shift is not None and not self._leaps(time + self.shift):
            self.live.dropped += self.live._due(self.live._index, time + self.shift)
        if self.leaving_out and now - self.since > _LONG_S and not self.live._reported_slow:
            self.live._reported_slow = True
            self.live._warn(f"{self.live.address.name}: decoding is too slow here; frames are skipped")
        return self.leaving_out
