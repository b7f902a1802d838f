"""Reading, preparing and counting overlap; faults reach the caller; nothing piles up and nothing is left running."""

from __future__ import annotations

import threading
import time
import tracemalloc

import numpy as np
import pytest
from videos import make_video, tone, write_moving

from crowdexit.errors import CrowdExitError
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.pipeline import Threads, count_frames
from crowdexit.jobs.smooth import Smoother, SmoothError
from crowdexit.video.container import VideoError
from crowdexit.video.decode import Span
from crowdexit.video.frames import parse_time, read_frames


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + 10
    while any(thread.name != "counting" for thread in set(threading.enumerate()) - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_items_come_in_order_and_are_made_ahead():
    made = []

    def items():
        for i in range(20):
            made.append(i)
            yield i

    with Threads() as threads:
        ahead = threads.ahead(items(), 3)
        deadline = time.monotonic() + 10
        while len(made) < 4:  # three are held, one waits for its place
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == 4
        assert list(ahead) == list(range(20))


def test_parts_work_at_the_same_time():
    """Two parts that wait for each other: one alone would wait for ever."""
    meet = threading.Barrier(2, timeout=10)

    def first():
        for i in range(5):
            yield i
            meet.wait()

    def second(items):
        for i in items:
            meet.wait()
            yield 10 * i

    with Threads() as threads:
        assert list(threads.ahead(second(threads.ahead(first(), 1)), 1)) == [0, 10, 20, 30, 40]


def test_a_fault_arrives_behind_what_was_good():
    def items():
        yield 1
        yield 2
        raise VideoError("broken")

    with Threads() as threads:
        ahead = threads.ahead((i for i in threads.ahead(items(), 5)), 5)
        assert [next(ahead), next(ahead)] == [1, 2]
        with pytest.raises(VideoError, match="broken"):
            next(ahead)


def test_leaving_early_ends_the_threads_and_closes_what_they_read():
    closed = threading.Event()

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    with Threads() as threads:
        next(threads.ahead(threads.ahead(endless(), 2), 2))
    assert closed.wait(10)


def test_a_count_that_is_left_early_closes_the_video(tmp_path, counter):
    path = make_video(tmp_path / "v.mp4", [i / 10 for i in range(100)], audio=tone(10))
    frames = read_frames(path, Span(10))
    counted = count_frames(counter, frames, "v", CountOptions(batch=2))
    next(counted)
    counted.close()
    with pytest.raises(StopIteration):
        next(frames)


def test_faults_of_every_part_reach_the_caller(tmp_path, counter, monkeypatch):
    path = make_video(tmp_path / "v.mp4", [i / 10 for i in range(30)])
    with pytest.raises(VideoError, match="no such"):
        list(count_frames(counter, read_frames(tmp_path / "none.mp4"), "none.mp4"))
    with pytest.raises(CrowdExitError, match="no exit 'V9'"):
        list(count_frames(counter, read_frames(path), "v", CountOptions(exit="V9")))
    for none in (0, -1, 65):
        with pytest.raises(VideoError, match=f"a batch of {none} frames"):
            CountOptions(batch=none)
    with pytest.raises(VideoError, match="a batch of 2 frames cannot keep a deadline"):
        CountOptions(batch=2, deadline_ms=10.0)
    assert [CountOptions().batch_size, CountOptions(deadline_ms=10.0).batch_size, CountOptions(batch=3).batch_size] == [
        4,
        1,
        3,
    ]
    for part in ("prepare", "answers"):
        with monkeypatch.context() as patch:
            patch.setattr(type(counter), part, lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                list(count_frames(counter, read_frames(path), "v"))


def test_memory_does_not_grow_with_length(tmp_path, counter):
    """Twenty-five times as long a video, hardly more memory at its peak: of Python's and of numpy's."""
    peaks = []
    for frames in (60, 1500):
        path = tmp_path / f"{frames}.mp4"
        write_moving(path, frames, rate=100, key_every=10, options={"preset": "ultrafast"})
        tracemalloc.start()
        counted = 0
        for _, result in count_frames(_Nothing(), read_frames(path, Span(1000)), "v"):
            counted += 1
            assert result is None
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert counted == frames
    assert peaks[1] < peaks[0] + 200_000


class _Nothing:
    """A counter that prepares nothing and answers nothing."""

    def size_for(self, width, height):
        return width, height

    def prepare(self, samples):
        return samples

    def answers(self, batch, exit, policy):
        return [None for _ in batch]


def test_smoothing():
    smoother = Smoother(2.0)
    assert smoother.add(0.0, 10.0) == 10.0
    assert smoother.add(2.0, 20.0) == pytest.approx((5 + 20) / 1.5)
    # Twice as many frames that say the same change nothing of what a half-life is.
    dense, sparse = Smoother(1.0), Smoother(1.0)
    for i in range(200):
        a = dense.add(i / 20, 0.0)
    for i in range(20):
        b = sparse.add(i / 2, 0.0)
    for i in range(1, 81):
        a = dense.add(10 + i / 20, 100.0)
    for i in range(1, 9):
        b = sparse.add(10 + i / 2, 100.0)
    assert a == pytest.approx(100 * (1 - 0.5**4), abs=0.5)
    assert b == pytest.approx(100 * (1 - 0.5**4), abs=2.5)
    raw = Smoother(0.0)
    assert [raw.add(t, c) for t, c in ((0, 3.0), (0, 9.0), (1, 1.0))] == [3.0, 9.0, 1.0]
    noisy = np.random.default_rng(0).normal(50, 10, 500)
    smooth = [smoother.add(10 + i / 10, value) for i, value in enumerate(noisy)]
    assert np.std(smooth[100:]) < 0.4 * np.std(noisy)
    for half_life in (-1.0, float("nan"), float("inf")):
        with pytest.raises(SmoothError):
            Smoother(half_life)


def test_times():
    assert [parse_time(t) for t in ("90", "1.5", "1:30", "0:01:30.5", "100:00:00")] == [90, 1.5, 90, 90.5, 360_000]
    for text in ("", "-1", "1:2:3:4", "1:", "x", "nan", "1e3"):
        with pytest.raises(VideoError, match="no time"):
            parse_time(text)
