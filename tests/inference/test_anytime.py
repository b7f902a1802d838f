"""Deadlines: the latest answer even in the middle of a stage, nothing begun in vain, nobody disturbed.

Stages sleep; a loaded machine only makes them longer, so every bound here leaves it the better part of a second.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
from slow import slow

from crowdexit.data.image import ImageError
from crowdexit.inference.anytime import DeadlineMissed, _Waking, answers_by
from crowdexit.inference.errors import CounterError
from crowdexit.inference.profile import PREPARING, stage_step

SERVED = ["V1", "AV1", "AV2", "final"]


@pytest.fixture(autouse=True)
def nothing_is_left_running():
    """The counting thread is one for all: what a test has left there would take the next one's time."""
    yield
    assert answers_by(time.perf_counter() + 60, iter(["idle"]), wait=True) == ["idle"]


def make_image(seed: int = 0, shape: tuple[int, int] = (64, 128)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*shape, 3), np.uint8)


@pytest.fixture
def expected(counter):
    """What each exit says of an image when nobody hurries."""

    def of(image: np.ndarray) -> dict[str, float]:
        return {result.exit: result.count for result in counter.stream(image)}

    return of


def test_the_latest_answer_in_the_middle_of_a_stage(counter, expected):
    tool = slow(counter.network, 0, 0, 0, 4)
    begun = time.perf_counter()
    result = tool.count(make_image(), deadline_ms=1500)
    assert 1.49 <= time.perf_counter() - begun < 3  # it may give what there is five milliseconds early
    assert result.chosen.exit == "AV2"
    assert [r.exit for r in result.exits] == SERVED[:3]
    assert all(r.latency_ms < 1500 for r in result.exits)
    assert result.in_time
    assert {r.exit: r.count for r in result.exits} == pytest.approx(
        {name: count for name, count in expected(make_image()).items() if name != "final"}, rel=1e-5
    )
    assert 3 not in tool.chain.ran  # it is still under way


def test_the_rest_is_called_off(counter):
    tool = slow(counter.network, 0, 1.5, 0, 0)
    first = tool.count(make_image(), deadline_ms=500)
    assert (first.chosen.exit, first.in_time) == ("V1", True)
    assert tool.count(make_image(1)).exits[-1].exit == "final"
    # The stage that was running has not come to its end: behind its wait, its first layer was not begun.
    assert tool.chain.ran == [0, "V1", 0, "V1", 1, "AV1", 2, "AV2", 3, "final"]


def test_the_next_request_is_not_disturbed(counter, expected):
    """It waits for the running step and no longer, and its time runs meanwhile; what it says is its own."""
    tool = slow(counter.network, 0, 2, 0, 3)
    tool.count(make_image(), deadline_ms=300)
    tool.chain.seconds = [0, 0, 0, 3]
    result = tool.count(make_image(1), deadline_ms=3500)
    assert result.chosen.exit == "AV2"
    assert 1000 < result.exits[0].latency_ms < 3000
    own = expected(make_image(1))
    assert {r.exit: r.count for r in result.exits} == pytest.approx({n: own[n] for n in SERVED[:3]}, rel=1e-5)


def test_too_early_for_the_first_exit(counter):
    tool = slow(counter.network, 1, 0, 0, 0)
    begun = time.perf_counter()
    with pytest.raises(DeadlineMissed, match=r"^no exit answered within 200 ms$"):
        tool.count(make_image(), deadline_ms=200, late="fail")
    assert time.perf_counter() - begun < 1
    waited = tool.count(make_image(), deadline_ms=200)  # for the first exit, and no other
    assert [r.exit for r in waited.exits] == ["V1"]
    assert waited.in_time is False
    assert waited.to_dict("p")["in_time"] is False
    assert waited.chosen.latency_ms > 200
    # From then on it is known how long that takes, with all that comes before it.
    for _ in range(9):
        tool.predictor.latency.times.note(PREPARING, 1, 3000.0)
    with pytest.raises(DeadlineMissed, match=r"\(the first, V1, takes about 4\d\d\d ms here\)"):
        tool.count(make_image(), deadline_ms=200, late="fail")


def test_enough_time_is_not_spent(counter, expected):
    begun = time.perf_counter()
    result = slow(counter.network, 0, 0, 0, 0).count(make_image(), deadline_ms=60_000)
    assert time.perf_counter() - begun < 30
    assert (result.chosen.exit, result.in_time) == ("final", True)
    assert {r.exit: r.count for r in result.exits} == pytest.approx(expected(make_image()), rel=1e-5)
    assert result.chosen.density is not None
    assert "in_time" not in counter.count(make_image()).to_dict("p")


def test_up_to_an_exit(counter):
    tool = slow(counter.network, 0, 0, 4, 0)
    result = tool.count(make_image(), exit="AV1", deadline_ms=30_000)
    assert [r.exit for r in result.exits] == ["V1", "AV1"]
    assert tool.count(make_image(), deadline_ms=float("inf"), exit="V1").chosen.exit == "V1"


def test_a_stage_that_cannot_end_in_time_is_not_begun(counter):
    tool = slow(counter.network, 0.02, 0, 0, 3)
    for _ in range(16):
        for index, ratio in enumerate((1.0, 0.0, 0.0, 100.0)):
            tool.predictor.latency.times.note(stage_step(index), 1, ratio * 20, 20.0 if index else None)
    begun = time.perf_counter()
    result = tool.count(make_image(), deadline_ms=1900)
    assert time.perf_counter() - begun < 1.8
    assert result.chosen.exit == "AV2"
    assert tool.chain.ran[-1] == "AV2"


def test_an_answer_is_waited_for_even_where_its_stage_cannot_end_in_time(counter):
    tool = slow(counter.network, 0.02, 0.5, 0, 0)
    for _ in range(16):
        tool.predictor.latency.times.note(stage_step(0), 1, 20.0)
        tool.predictor.latency.times.note(stage_step(1), 1, 500.0, 20.0)
    tool.exits = ["AV1"]
    assert [r.exit for r in tool.count(make_image(), deadline_ms=300).exits] == ["AV1"]


def test_what_goes_wrong_reaches_whoever_asked(counter, tmp_path):
    tool = slow(counter.network, 0, 0, 0, 0)
    with pytest.raises(ImageError, match="no such file"):
        tool.count(tmp_path / "none.jpg", deadline_ms=10_000)
    with pytest.raises(ImageError, match="too small"):
        tool.count(np.zeros((4, 4, 3), np.uint8), deadline_ms=10_000, late="fail")
    for problem in (RuntimeError("out of memory"), KeyboardInterrupt()):
        tool.chain.breaks = problem
        with pytest.raises(type(problem)):
            tool.count(make_image(), deadline_ms=10_000)
    tool.chain.breaks = None
    assert tool.count(make_image(), deadline_ms=60_000).chosen.exit == "final"
    for wrong in (0, -5, float("nan")):
        with pytest.raises(CounterError, match=r"a deadline of .* ms is not positive"):
            tool.count(make_image(), deadline_ms=wrong)


def test_what_goes_wrong_after_the_deadline_is_nobodys(counter):
    tool = slow(counter.network, 0, 1.5, 0, 0)
    breaking = threading.Timer(1.0, lambda: setattr(tool.chain, "breaks", RuntimeError("late")))
    breaking.start()
    assert tool.count(make_image(), deadline_ms=500).chosen.exit == "V1"
    breaking.join()
    time.sleep(1)
    tool.chain.breaks = None
    assert tool.count(make_image(), deadline_ms=60_000).chosen.exit == "final"


def test_an_answer_stands_whatever_comes_after_it(counter, caplog):
    tool = slow(counter.network, 0, 0.5, 0, 0)
    breaking = threading.Timer(0.3, lambda: setattr(tool.chain, "breaks", RuntimeError("out of memory")))
    breaking.start()
    result = tool.count(make_image(), deadline_ms=60_000, late="fail")
    assert (result.chosen.exit, result.in_time) == ("V1", True)
    assert "keeping the latest result, as the next exit failed: RuntimeError: out of memory" in caplog.text


@pytest.mark.parametrize("breaks", ["never", "before the deadline", "after it"])
def test_requests_are_not_retained(counter, breaks):
    """Freed at once, nothing is to be collected."""
    tool = slow(counter.network, 0, 0.8 if breaks == "after it" else 0, 0, 0)
    tool.chain.breaks = RuntimeError("out of memory") if breaks == "before the deadline" else None
    image = make_image()
    gone = weakref.ref(image)
    gc.disable()
    try:
        with pytest.raises(RuntimeError) if tool.chain.breaks else nullcontext():
            tool.count(image, deadline_ms=400 if breaks == "after it" else 60_000)
        del image
        if breaks == "after it":
            tool.chain.breaks = RuntimeError("out of memory")
            time.sleep(1)
        tool.chain.breaks = None
        assert ended(gone)
    finally:
        gc.enable()


def ended(gone: weakref.ref) -> bool:
    """Whether it is gone, when the thread has had time to let go of it."""
    until = time.perf_counter() + 10
    while gone() is not None and time.perf_counter() < until:
        time.sleep(0.01)
    return gone() is None


def test_beside_a_thread_that_does_not_hurry(counter):
    """Whose steps come one after the other without a pause: a request waits for one of them at a time."""
    tool = slow(counter.network, 0.02, 0.02, 0.02, 0.02)
    unhurried, stop = [(make_image(), None)], threading.Event()
    ran: list[tuple[int, int | str]] = []
    advance = tool.chain.advance
    tool.chain.advance = lambda index, state: ran.append((threading.get_ident(), index)) or advance(index, state)

    def count() -> None:
        while not stop.is_set():
            list(tool.count_many(unhurried * 4))

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(5):
            ran.clear()
            assert tool.count(make_image(1), deadline_ms=60_000).chosen.exit == "final"
            between = [0]
            for who, _ in ran:
                if who == thread.ident:
                    between[-1] += 1
                else:
                    between.append(0)
            assert len(between) == 5
            # Of every stage of the request, and of the answers after it, one step.
            assert max(between[:-1]) <= 2
    finally:
        stop.set()
        thread.join()


def test_two_at_once(counter, expected):
    """Each gets its own counts; who comes second has his first answer long before the first one's last."""
    tool = slow(counter.network, 0.3, 0.3, 0.3, 0.3)
    results = {}

    def run_exit(seed: int) -> None:
        results[seed] = tool.count(make_image(seed), deadline_ms=60_000)

    threads = [threading.Thread(target=run_exit, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    assert results.keys() == {1, 2, 3}
    for seed, result in results.items():
        assert {r.exit: r.count for r in result.exits} == pytest.approx(expected(make_image(seed)), rel=1e-5)
    assert results[3].exits[0].latency_ms < min(result.exits[-1].latency_ms for result in results.values())


def test_many_deadlines(counter, expected):
    """From three threads, of any length: always the first exits of the very image."""
    tool = slow(counter.network, 0.004, 0.002, 0.002, 0.004)
    images = [make_image(seed) for seed in range(3)]
    truth = [expected(image) for image in images]
    faults: list[object] = []

    def run_exit(who: int) -> None:
        random = np.random.default_rng(who)
        for _ in range(40):
            deadline = float(random.uniform(0.1, 60))
            try:
                result = tool.count(images[who], deadline_ms=deadline)
                counts = {r.exit: r.count for r in result.exits}
                assert list(counts) == SERVED[: len(counts)]
                assert counts == pytest.approx({name: truth[who][name] for name in counts}, rel=1e-5)
                assert result.chosen is result.exits[-1]
                assert result.in_time == (result.chosen.latency_ms <= deadline)
                assert result.in_time or len(counts) == 1
            except BaseException as fault:
                faults.append(fault)

    threads = [threading.Thread(target=run_exit, args=(who,)) for who in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_tiled_image_in_time(counter, expected, monkeypatch):
    """Its first exit answers for all tiles before any tile goes on."""
    monkeypatch.setattr("crowdexit.inference.collate.PIXELS_PER_BATCH", 2 * 128 * 64)
    tool = slow(counter.network, 0, 5, 0, 0)
    huge = make_image(0, (600, 1500))
    result = tool.count(huge, deadline_ms=4000)
    assert [r.exit for r in result.exits] == ["V1"]
    assert result.count == pytest.approx(expected(huge)["V1"], rel=1e-5)


def test_a_counter_goes_and_the_thread_stays(counter):
    threads = set()
    for _ in range(2):
        tool = slow(counter.network, 0, 0, 0, 0)
        tool.count(make_image(), deadline_ms=60_000)
        threads |= {thread for thread in threading.enumerate() if thread.name == "counting"}
        gone = weakref.ref(tool.chain)
        del tool
        gc.collect()
        assert ended(gone)
    assert len(threads) == 1
    assert threads.pop().is_alive()


def test_who_was_woken_late_wakes_earlier_the_next_time(monkeypatch):
    waking = _Waking()
    monkeypatch.setattr("crowdexit.inference.anytime._waking", waking)
    waited: list[float] = []
    wait_for = threading.Condition.wait_for

    def late(self, predicate, timeout=None):
        counts = wait_for(self, predicate, timeout)
        if threading.current_thread() is threading.main_thread() and timeout:
            waited.append(timeout)
            time.sleep(0.05)
        return counts

    monkeypatch.setattr(threading.Condition, "wait_for", late)

    def steps(over: threading.Event) -> Iterator[str]:
        yield "first exit"
        over.wait(10)

    for _ in range(2):
        over = threading.Event()
        assert answers_by(time.perf_counter() + 1, steps(over), wait=False) == ["first exit"]
        over.set()
    assert waking.early_s == 0.005  # and no more, however late it was
    assert waited[1] <= 0.995
    waking.woke(0.0)
    assert waking.early_s == pytest.approx(0.0045)


def test_a_process_ends_after_the_running_stage():
    """A thread that runs on in torch while the interpreter is taken down would bring it to a crash."""
    program = """
import time
from crowdexit.inference.anytime import answers_by
def steps():
    yield "first exit"
    time.sleep(2)
    print("stage ended", flush=True)
    yield None
    print("the next began", flush=True)
print(answers_by(time.perf_counter() + 0.5, steps(), wait=True), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "['first exit']\nstage ended\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to fork with")
def test_a_process_that_was_forked_off_has_a_thread_of_its_own():
    """Even where the first one's was in the middle of a step."""
    program = """
import os, time
from crowdexit.inference.anytime import answers_by
def steps(seconds):
    yield "first exit"
    time.sleep(seconds)
    yield "second exit"
answers_by(time.perf_counter() + 0.2, steps(1), wait=True)
child = os.fork()
print(answers_by(time.perf_counter() + 30, steps(0), wait=False), flush=True)
if child:
    print(os.waitpid(child, 0)[1], flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["['first exit', 'second exit']"] * 2 + ["0"]
