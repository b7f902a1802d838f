"""The frames of a video file that are due, in the order of time; as little else as possible is decoded.

Which frame is which follows from the time stamps of all packets, a packet being a frame; reading packets costs
next to nothing. So a frame's number and time, and which ones are due, are the same wherever decoding begins.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from crowdexit.data.media import FAULTS, MOST_FAULTS
from crowdexit.video.container import VideoError, nominal_step, open_file, read_only, stated_length, video_stream
from crowdexit.video.display import Display, StreamDisplay

DEFAULT_FPS = 1.0
_MOST_FPS = 1e6
ROUNDING_S = 0.001  # time stamps in Matroska are whole milliseconds

_REORDER = 32  # packets; no codec stores a frame more than sixteen packets after one that is shown later
_MOST_HELD, _MOST_BYTES = 512, 2**26  # of packets of which it is not known yet whether they are needed
# Where packets are missing, most formats do not tell; this long without a frame is worth a word. MPEG-TS is made for
# ways on which packets get lost, and for even rates: a few frames are enough.
HOLE_S, _HOLE_STEPS, _HOLE_STEPS_TS = 3.0, 20, 5
# A time stamp so far behind the one before it, and behind the end, is damaged. (Without an end: an hour.)
_LEAP_S, _LEAP_WITHOUT_END_S = 60.0, 3600.0
_MOST_THREADS = 16  # of FFmpeg's own choice
# Where a frame that no other refers to is left out exactly as the standard says.
_LEAVES_OUT = ("h264", "mpeg4", "mpeg2video", "mpeg1video")


@dataclass(frozen=True)
class Span:
    """Which frames of a video to take.

    Attributes:
        fps: at most so many a second, by their time stamps: the first at or after each 1/fps.
        start, end: of these, the ones from ``start`` to before ``end``, in seconds since the first frame.
        after: and of these, the ones behind the frame of that index.

    Raises:
        VideoError: for a rate or a time that is none.
    """

    fps: float = DEFAULT_FPS
    start: float = 0.0
    end: float = math.inf
    after: int = -1

    def __post_init__(self) -> None:
        if not 0 < self.fps <= _MOST_FPS:
            raise VideoError(f"{self.fps:g} frames a second cannot be counted")
        if not (0 <= self.start < self.end):
            raise VideoError(f"nothing to count from {self.start:g} s to {self.end:g} s")


class Due:
    """Says of one frame after the other, in the order of time, whether it is to be taken."""

    def __init__(self, span: Span) -> None:
        self.span = span
        self._next = 0

    def __call__(self, index: int, time: float) -> bool:
        if time < self._next / self.span.fps - ROUNDING_S:
            return False
        self._next = math.floor((time + ROUNDING_S) * self.span.fps) + 1
        return index > self.span.after and time >= self.span.start - ROUNDING_S and not self.past(time)

    def past(self, time: float) -> bool:
        """Whether nothing from this time on is to be taken."""
        return time >= self.span.end - ROUNDING_S


class Shown(NamedTuple):
    """A decoded frame.

    Attributes:
        number: among all of the video's. time: seconds since the first one. image: FFmpeg's frame.
        display: how it is shown.
        lost: (from, to) in seconds where frames before this one are damaged, since the last one that was shown.
        behind_hole: (from, to) where there are no frames, if this one is made from what may have been lost there.
    """

    number: int
    time: float
    image: Any
    display: Display
    lost: tuple[float, float] | None
    behind_hole: tuple[float, float] | None = None


class FrameSampler:
    """Iterates over the frames of a video file that are due.

    After damage it goes on with the next key frame; the frames in between are lost.

    Attributes (as far as has been read):
        origin: the first frame on the file's own clock, in seconds.
        length: seconds from there to the end of the last frame.
        stored: seconds that the packets last; more than the length where the last frame is shown for long.
        gaps: (from, to) in seconds where frames are lost or there are none for long; to None: the rest.
        begins: seconds from which on frames are asked for.
        past: whether all that is asked for lies before what has been read.
        lost_beginning: whether frames before the first one are damaged, and their number is not known.

    Raises:
        VideoError: if it cannot be read at all.
    """

    def __init__(self, path: Path, span: Span) -> None:
        self.path, self.span = path, span
        self._open()

    def _open(self) -> None:
        self.origin = self.length = self.stored = 0.0
        self.gaps: list[tuple[float, float | None]] = []
        self.begins, self.past = self.span.start, False
        self.container = open_file(self.path)
        try:
            self.stream = video_stream(self.container, str(self.path))
        except VideoError:
            self.close()
            raise
        self.frame_step = nominal_step(self.stream)
        self._display = StreamDisplay(self.stream)
        read_only(self.container, self.stream)
        self.lost_beginning = False
        self._lost_from: float | None = None
        self._losses: list[tuple[float, float]] = []  # where frames are damaged since the last one shown
        self._before_loss: deque[int] = deque()  # the latest stamps before places where packets could not be read
        self._holes: deque[tuple[float, float]] = deque()  # without frames for long, not yet decoded
        self._behind_hole: tuple[float, float] | None = None  # until the next key frame
        self._reached = 0.0  # the time of the last good frame that came out of the decoder

    def close(self) -> None:
        """Close the file."""
        self.container.close()

    def __iter__(self) -> Iterator[Shown]:
        last = self.span.after
        try:
            for shown in self._read(self.span, leaping=True):
                last = shown.number
                yield shown
        except _NoEntry:
            self.close()
            self._open()
            yield from self._read(replace(self.span, after=last), leaping=False)
        finally:
            if self._lost_from is not None:
                self.gaps.append((self._lost_from, None))
            elif self._before_loss and not self.past:
                self.gaps.append((self.length, None))

    def _read(self, span: Span, *, leaping: bool) -> Iterator[Shown]:
        packets = self._packets()
        first = list(islice(packets, _REORDER + 1))
        # AVI has no time stamps but the order of storing, whatever FFmpeg makes of it.
        timed = "avi" not in self.container.format.name and all(p.pts is not None for p in first)
        everything = chain(first, packets)
        return _Planned(self, span, leaping).images(everything) if timed else self._all(everything, span)

    def _hole(self, fps: float) -> float:
        """Seconds without a frame from which on frames are taken to be missing, where ``fps`` are asked for."""
        if "mpegts" in self.container.format.name:
            return _HOLE_STEPS_TS * self.frame_step
        return max(HOLE_S, _HOLE_STEPS * self.frame_step, 2 / fps)

    def lose(self) -> None:
        """From the last good frame on, what follows is lost."""
        if self._lost_from is None:
            self._lost_from = self._reached

    def good(self, time: float, key: bool) -> None:
        """A frame has come out of the decoder as it should; a key frame is made from no other."""
        while self._holes and self._holes[0][1] <= time:
            self._behind_hole = self._holes.popleft()
        if key:
            self._behind_hole = None
        if self._lost_from is not None:
            self._miss(self._lost_from, time)
            self._lost_from = None
        self._reached = time

    def _miss(self, begin: float, end: float) -> None:
        self.gaps.append((begin, end))
        self._losses.append((begin, end))

    def follow(self, stamp: int, before: float, time: float, fps: float) -> None:
        """The next frame in the order of time has that stamp; the one before it ended at ``before``."""
        if self._before_loss and stamp > self._before_loss[0]:
            while self._before_loss and stamp > self._before_loss[0]:
                self._before_loss.popleft()
            self._miss(before, time)
        elif time - before > self._hole(fps):
            self.gaps.append((before, time))
            self._holes.append((before, time))

    def shown(self, number: int, time: float, image: Any) -> Shown:
        """A frame that has just come out of the decoder."""
        losses = [loss for loss in self._losses if loss[1] <= time]
        self._losses = [loss for loss in self._losses if loss[1] > time]
        lost = (min(begin for begin, _ in losses), max(end for _, end in losses)) if losses else None
        return Shown(number, time, image, self._display.of(image), lost, self._behind_hole)

    def _packets(self) -> Iterator[Any]:
        """The packets in the order of storing, from the first key frame on, on a clock that is never set back."""
        demuxed, faults, lost = self.container.demux(self.stream), 0, False
        begun, before, first, offset, latest, earliest, last = False, 0, None, 0, None, None, None
        second, end = 1 / self.stream.time_base, stated_length(self.container, self.stream)
        while faults <= MOST_FAULTS:
            try:
                packet = next(demuxed)
            except StopIteration:
                break
            except FAULTS:
                faults, begun, before, lost = faults + 1, False, 0, True
                demuxed = self.container.demux(self.stream)
                continue
            faults = 0
            if not packet.size:  # the end, or a repetition of the frame before
                continue
            if packet.pts is not None and packet.dts is not None and packet.pts - packet.dts > _LEAP_S * second:
                begun, before, lost = False, 0, True  # no frame waits so long to be shown: the stamp is damaged
                continue
            if not begun:
                before += 1
                begun = packet.is_keyframe or before > _MOST_HELD
                if not begun:
                    continue
                first = packet.pts if first is None else first
            if packet.dts is not None:
                if latest is not None and earliest is not None:
                    ahead, behind_end = packet.dts + offset - latest, packet.dts + offset - earliest - end * second
                    leapt = min(ahead, behind_end) > _LEAP_S * second if end else ahead > _LEAP_WITHOUT_END_S * second
                    if leapt or ahead < -second:
                        right_again = offset != 0 and latest <= packet.dts <= latest + _LEAP_S * second
                        lost = lost or leapt or right_again
                        offset = 0 if right_again else latest - packet.dts + round(self.frame_step * second)
                latest = packet.dts + offset
                earliest = latest if earliest is None else earliest
                self.stored = float((latest + (packet.duration or 0) - earliest) * packet.time_base)
            if packet.pts is not None:
                packet.pts += offset
                if first is not None and packet.pts < first:  # needs what stood before the beginning
                    continue
            if lost and packet.pts is not None and last is not None:
                self._before_loss.append(last)
            elif lost:
                self.lose()
            lost = False
            if packet.pts is not None:
                last = packet.pts if last is None else max(packet.pts, last)
            yield packet
        if lost and last is not None:
            self._before_loss.append(last)
        elif lost:
            self.lose()

    def _all(self, packets: Iterable[Any], span: Span) -> Iterator[Shown]:
        """Decode everything, and count the frames as they come."""
        due, index, time, origin = Due(span), -1, 0.0, 0.0
        codec, broken = self.stream.codec_context, False
        for packet in chain(packets, [None]):
            broken = broken and packet is not None and not packet.is_keyframe
            if broken:
                continue
            try:
                images = codec.decode(packet)
            except FAULTS:
                images, broken = [], True
            for image in images:
                broken = broken or image.is_corrupt
                if broken:
                    break
                index += 1
                stamp = None if image.pts is None else float(image.pts * self.stream.time_base)
                if index == 0:
                    self.origin = origin = stamp or 0.0
                    self.lost_beginning = self._lost_from is not None
                elif stamp is None or stamp - origin < time:  # none, or a clock that was set back
                    time += self.frame_step
                else:
                    time = stamp - origin
                if due.past(time):
                    self.past = True
                    return
                if index == self.span.after:
                    self.begins = time
                self.good(time, bool(image.key_frame))
                self.length = time + self.frame_step
                if due(index, time):
                    yield self.shown(index, time, image)
            if broken:
                self.lose()
                codec.flush_buffers()


class _NoEntry(Exception):
    """Decoding cannot begin at what is marked as a key frame: the frame is refreshed bit by bit."""


class _Planned:
    """Decodes frames that have time stamps: the due ones, and those that they are made from.

    A packet is held back until all that is shown before it is known. Then its frame gets its number and time, and
    is due or not. From key frame to key frame, what nothing due depends on is not decoded.
    """

    def __init__(self, video: FrameSampler, span: Span, leaping: bool) -> None:
        self.video, self.due, self.leaping = video, Due(span), leaping
        self.codec = video.stream.codec_context
        self.leaves_out = self.codec.name in _LEAVES_OUT
        self.held: deque[Any] = deque()  # packets in the order of storing, not yet decoded
        self.keys: deque[Any] = deque()  # the key frames of these
        self.bytes = 0  # that are held
        self.stamps: list[int] = []  # a heap: of the packets that are not planned yet
        self.plan: dict[int, tuple[int, float]] = {}  # stamp → index, time of what may still come out
        self.planned = -math.inf  # the stamp until which all is known
        self.index = -1
        self.unfed: set[int] = set()  # stamps of due frames that the decoder has not been given
        self.pending: deque[int] = deque()  # stamps of due frames that have not come out
        self.broken = False  # nothing can be decoded before the next key frame
        self.fed: deque[Any] = deque(maxlen=_MOST_THREADS + 1)  # the packets that may be in the decoder's threads
        self.retried = -math.inf  # the stamp of the last key frame that has been decoded twice
        self.leapt = False  # the next key frame is not decoded on from what stood before it
        self.entry: int | None = None  # the stamp of the key frame that has to come out next, after a leap
        self.floor = -math.inf  # what is shown before that cannot be decoded after a leap

    def images(self, packets: Iterable[Any]) -> Iterator[Shown]:
        for packet in packets:
            self._hold(packet)
            while len(self.stamps) > _REORDER:
                self._plan_next()
            yield from self._advance()
            if self.video.past and not self.unfed:
                break
        else:
            while self.stamps:
                self._plan_next()
            self.planned = math.inf
            yield from self._advance()
        yield from self._drain()
        while self.broken and self.pending and self.keys and self.planned == math.inf:
            yield from self._advance()
            yield from self._drain()

    def _hold(self, packet: Any) -> None:
        self.held.append(packet)
        self.bytes += packet.size
        if packet.is_keyframe:
            self.keys.append(packet)
        if packet.pts is not None and not packet.is_discard:
            heappush(self.stamps, packet.pts)

    def _release(self) -> Any:
        packet = self.held.popleft()
        self.bytes -= packet.size
        if self.keys and self.keys[0] is packet:
            self.keys.popleft()
        self.unfed.discard(packet.pts)
        return packet

    def _plan_next(self) -> None:
        stamp = heappop(self.stamps)
        video, seconds = self.video, float(stamp * self.video.stream.time_base)
        self.index += 1
        if self.index == 0:
            video.origin = seconds
        before, time = video.length, seconds - video.origin
        self.planned = stamp
        video.past = video.past or self.due.past(time)
        if video.past:
            return
        if self.index == video.span.after:
            video.begins = time
        video.follow(stamp, before, time, self.due.span.fps)
        video.length = time + video.frame_step
        self.plan[stamp] = (self.index, time)
        if self.due(self.index, time):
            self.unfed.add(stamp)
            self.pending.append(stamp)

    def _advance(self) -> Iterator[Shown]:
        """Decode what is held, as far as it is needed and that is known."""
        while self.held:
            if self.broken and self.keys and self.keys[0].pts is not None:
                self.unfed.add(self.keys[0].pts)  # in place of what was lost, and to know where the damage ends
            self._leap()
            packet = self.held[0]
            if packet.pts is not None and packet.pts > self.planned:
                return
            if not self.unfed and len(self.held) <= _MOST_HELD and self.bytes <= _MOST_BYTES:
                return
            self._release()
            if packet.is_keyframe and (self.broken or self.leapt):
                yield from self._drain()
                self.entry = packet.pts if self.leapt else None
                self.floor = -math.inf if packet.pts is None else packet.pts
                self.broken, self.leapt = False, False
                self._forget(self.floor)
            if self.broken:
                self._lose(packet)
            elif packet.pts is None or packet.pts >= self.floor:
                yield from self._decode(packet)

    def _leap(self) -> None:
        """Let go of all that is held before the last key frame that nothing due is shown before."""
        needed = min(self.unfed, default=self.planned)
        target = None
        for key in self.keys:
            if key.pts is None or key.pts > needed:
                break
            target = key
        if target is None or target is self.held[0] or not self.leaping:
            return
        while self.held[0] is not target:
            self._release()
        self.leapt = True
        self._forget(target.pts)

    def _forget(self, stamp: float) -> None:
        """Nothing more is expected of what is shown before a stamp, but for what is owed or stands in for it."""
        stamp = min(stamp, self.pending[0]) if self.pending else stamp
        self.plan = {s: planned for s, planned in self.plan.items() if s >= stamp}

    def _lose(self, packet: Any) -> None:
        """Its frame will not come out; the first that was due stays owed, for another to stand in for it."""
        self.plan.pop(packet.pts, None)
        if packet.pts in islice(self.pending, 1, None):
            self.pending.remove(packet.pts)

    def _decode(self, packet: Any) -> Iterator[Shown]:
        due = packet.pts is None or packet.pts in self.pending
        self.codec.skip_frame = "NONREF" if self.leaves_out and not due else "DEFAULT"
        if packet.is_corrupt:
            yield from self._drain()
            self._break()
            return
        self.fed.append(packet)
        try:
            images = self.codec.decode(packet)
        except FAULTS:
            self._break()
            return
        yield from self._shown(images)

    def _shown(self, images: Iterable[Any]) -> Iterator[Shown]:
        for image in images:
            if image.is_corrupt:
                self._break()
                return
            if image.pts not in self.plan:
                continue
            if self.entry is not None and image.pts != self.entry:
                raise _NoEntry
            self.entry = None
            index, time = self.plan[image.pts]
            self.video.good(time, bool(image.key_frame))
            pending = len(self.pending)
            while self.pending and self.pending[0] <= image.pts:  # itself, or one before that was lost
                self.pending.popleft()
            self._forget(image.pts + 1)
            if len(self.pending) < pending:
                yield self.video.shown(index, time, image)

    def _drain(self) -> Iterator[Shown]:
        """What the decoder still holds; it is then as new."""
        if not self.broken:
            with suppress(*FAULTS):
                yield from self._shown(self.codec.decode(None))
            if self.entry is not None:
                raise _NoEntry
        self.codec.flush_buffers()
        self.fed.clear()

    def _break(self) -> None:
        """Something that the decoder was given is damaged; which packet, decoders that use threads tell late."""
        self.video.lose()
        self.broken, self.entry = True, None
        fed = list(self.fed)
        self.fed.clear()
        for i, packet in enumerate(fed):
            if packet.is_keyframe and packet.pts is not None and packet.pts > self.retried:
                # The damage may lie before this one: once more from here.
                self.retried = packet.pts
                self.held.extendleft(reversed(fed[i:]))
                self.keys.extendleft(packet for packet in reversed(fed[i:]) if packet.is_keyframe)
                self.bytes += sum(packet.size for packet in fed[i:])
                self.unfed.update(packet.pts for packet in fed[i:] if packet.pts in self.pending)
                return
