"""Who leaves where: whatever the order and the batch, the same; and nothing is computed for those who have left."""

from __future__ import annotations

import json
import time
import weakref

import cv2
import numpy as np
import pytest
from slow import slow

from crowdexit.calibration.intervals import Intervals
from crowdexit.data.views import tile_boxes
from crowdexit.errors import OptionError
from crowdexit.inference import collate
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.budget import BudgetError, BudgetTooSmall
from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.errors import CounterError
from crowdexit.inference.policies import ANYTIME, Confident, DeepestThatFits, PolicyError, policy_named
from crowdexit.inference.profile import FIRST, LAYING, PREPARING, Profile, exit_step, stage_step
from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.sources import SourceError
from crowdexit.runtimes.eager import Eager

SERVED = ["V1", "AV1", "AV2", "final"]
WIDTHS = {"V1": 0.4, "AV1": 0.3, "AV2": 0.2, "final": 0.1}
ERRORS = {name: width / 2 for name, width in WIDTHS.items()}
SIZES = [(128, 64), (64, 64), (300, 100), (100, 40), (128, 64), (1024, 256), (61, 33)]


@pytest.fixture
def calibrated(counter):
    return CrowdCounter(counter.network, "tiny", runtime=Eager(), intervals=Intervals(0.9, WIDTHS, {}, 20))


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return [random.integers(0, 60 + 30 * i, (height, width, 3), np.uint8) for i, (width, height) in enumerate(SIZES)]


@pytest.fixture
def log_mels():
    random = np.random.default_rng(1)
    return [None, *(random.normal(size=(96, 64)).astype(np.float32) for _ in range(2)), None, None, None, None]


def left_between(counter, images) -> Confident:
    """A policy by which about half of the images leave at the first exit."""
    halves = sorted(WIDTHS["V1"] * (next(counter.stream(image)).count + 10) for image in images)
    return Confident((halves[2] + halves[3]) / 2)


@pytest.mark.parametrize("batch_size", [1, 2, 1000])
def test_order_and_batch_do_not_matter(calibrated, images, log_mels, monkeypatch, batch_size):
    policy = left_between(calibrated, images)
    pairs = list(zip(images, log_mels, strict=True))
    alone = [calibrated.count(*pair, policy=policy) for pair in pairs]
    assert len({result.chosen.exit for result in alone}) > 1
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", batch_size * 128 * 64)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(pairs)).tolist()
        together = list(calibrated.count_many([pairs[i] for i in order], policy=policy))
        for i, result in zip(order, together, strict=True):
            assert [r.exit for r in result.exits] == [r.exit for r in alone[i].exits]
            assert [r.count for r in result.exits] == pytest.approx([r.count for r in alone[i].exits], rel=1e-4)
            assert result.chosen is result.exits[-1]
            assert (result.chosen.density is None) == (alone[i].chosen.density is None)


def test_who_has_left_costs_nothing(counter, images, monkeypatch):
    tool = slow(counter.network, 0, 0, 0, 0, intervals=Intervals(0.9, WIDTHS, {}, 20))
    policy = left_between(tool, images)
    rows: list[tuple[int, int]] = []
    advance = tool.chain.advance
    monkeypatch.setattr(
        tool.chain, "advance", lambda index, state: rows.append((index, len(state.visual))) or advance(index, state)
    )
    results = list(tool.count_many([(image, None) for image in images], policy=policy))
    for index, name in enumerate(SERVED):
        reached = [p for r, p in zip(results, images, strict=True) if name in [e.exit for e in r.exits]]
        tiles = sum(len(tile_boxes(p.shape[1], p.shape[0], tool.size)) for p in reached)
        assert sum(n for stage, n in rows if stage == index) == tiles


def test_confident_in_people_or_as_a_share(calibrated, images):
    for image in images:
        answers = list(calibrated.stream(image))
        for policy in (Confident(5.0), Confident(share=0.5), Confident(4.0, 0.3), Confident(1e9), Confident(1e-9)):
            bounds = [max(policy.uncertainty, policy.share * r.count) for r in answers]
            halves = [r.interval[1] - r.count for r in answers]
            enough = [half <= bound for half, bound in zip(halves, bounds, strict=True)]
            expected = SERVED[enough.index(True)] if any(enough) else "final"
            assert calibrated.count(image, policy=policy).chosen.exit == expected
    assert calibrated.count(images[0], policy=Confident(1e9), deadline_ms=60_000).chosen.exit == "V1"
    # Not calibrated with sound: nobody is ever sure.
    has_audio = calibrated.count(images[0], np.zeros((96, 64), np.float32), policy=Confident(1e9))
    assert has_audio.chosen.exit == "final"


ALL = ["V1", "V1-cnn", "AV1", "AV1-cnn", "AV2", "AV2-cnn", "final"]


@pytest.mark.parametrize("batch_size", [1, 1000])
def test_leaving_between_the_exits_of_a_stage(counter, images, monkeypatch, batch_size):
    """The first answer that is sure enough counts; what comes after it at the same stage is not asked any more."""
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", batch_size * 128 * 64)
    widths = dict(zip(ALL, (0.4, 0.9, 0.5, 0.2, 0.9, 0.3, 0.1), strict=True))
    tool = CrowdCounter(counter.network, "tiny", runtime=Eager(), exits=ALL, intervals=Intervals(0.9, widths, {}, 20))
    answers = [list(tool.stream(image)) for image in images]
    policy = left_between(tool, images)
    expected = []
    for of_one in answers:
        enough = [r.interval[1] - r.count <= policy.uncertainty for r in of_one[:-1]]
        expected.append(ALL[: [*enough, True].index(True) + 1])
    assert len({len(names) for names in expected}) > 1
    assert ["V1"] in expected
    for image, names in zip(images, expected, strict=True):
        assert [r.exit for r in tool.count(image, policy=policy).exits] == names
    together = tool.count_many([(image, None) for image in images], policy=policy)
    assert [[r.exit for r in result.exits] for result in together] == expected


def test_confident_on_an_image_of_very_many_tiles(calibrated, images, monkeypatch):
    """Its tiles go through the network a few at a time; what counts is their sum."""
    image = next(p for p in images if p.shape == (256, 1024, 3))
    answers = {r.exit: r for r in calibrated.stream(image)}
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 128 * 64)
    monkeypatch.setattr(collate, "PIXELS_IN_FLIGHT", 128 * 64)
    widest = answers["V1"].interval[1] - answers["V1"].count
    for policy, exit in [(Confident(widest * 1.01), "V1"), (Confident(widest * 0.99), "AV1")]:
        result = calibrated.count(image, policy=policy)
        assert result.chosen.exit == exit
        assert result.count == pytest.approx(answers[exit].count, rel=1e-4)


def test_who_has_left_is_let_go_at_once(counter, images, monkeypatch):
    """A part that has left is not in memory any more while others go through the stage."""
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 128 * 64)
    tool = slow(counter.network, 0, 0, 0, 0, intervals=Intervals(0.9, WIDTHS, {}, 20))
    small = [image for image in images if image.shape[1] <= 300]
    halves = [WIDTHS["V1"] * (next(tool.stream(image)).count + 10) for image in small]
    held: list[weakref.ref] = []
    alive: list[int] = []
    advance = tool.chain.advance

    def watched(index, state):
        if index == 1:
            alive.append(sum(ref() is not None for ref in held))
        state = advance(index, state)
        if index == 0:
            held.append(weakref.ref(state.visual))
        return state

    monkeypatch.setattr(tool.chain, "advance", watched)
    last = int(np.argmax(halves))
    order = [*(p for i, p in enumerate(small) if i != last), small[last]]  # all but the last leave at the first exit
    policy = Confident((sorted(halves)[-2] + halves[last]) / 2)
    results = list(tool.count_many([(image, None) for image in order], policy=policy))
    assert [r.chosen.exit == "V1" for r in results] == [True] * (len(small) - 1) + [False]
    assert alive == [1]


def test_the_deepest_that_fits(counter, images):
    """Only that one is asked; the time of this very run decides, and the rest follows in proportion."""
    tool = slow(counter.network, 0.1, 0.1, 0.4, 0.8)
    profile = Profile()
    for rows in (1, 2):
        profile.note(FIRST, rows, 100.0)
        for index, ms in enumerate((100, 400, 800), 1):
            profile.note(stage_step(index), rows, float(ms), 100.0)
        for name in SERVED:
            profile.note(exit_step(name), rows, 20.0, 100.0)
    latency = tool.predictor.latency
    latency.profile = latency.times = profile
    for deadline, exit in [(60_000, "final"), (150, "V1"), (1, "V1")]:
        tool.chain.ran.clear()
        result = tool.count(images[0], deadline_ms=deadline, policy=DeepestThatFits())
        assert [r.exit for r in result.exits] == [exit]
        assert [step for step in tool.chain.ran if isinstance(step, str)] == [exit]
    # Ten times as slow as before: AV2 and what comes after it would take ten times as long, too.
    tool.chain.seconds = [1.0, 0.0, 0.0, 0.0]
    tool.chain.ran.clear()
    result = tool.count(images[0], deadline_ms=4000, policy=DeepestThatFits())
    assert [r.exit for r in result.exits] == ["AV1"]
    with pytest.raises(CounterError, match="needs a deadline"):
        tool.count(images[0], policy=DeepestThatFits())
    with pytest.raises(CounterError, match="set a budget"):
        tool.count_many([(images[0], None)], policy=DeepestThatFits())


def test_a_stage_is_not_given_up_because_the_first_was_held_up(counter, images):
    """By what the machine has done before the next one would be in time."""
    tool = slow(counter.network, 1.0, 0.0, 0.0, 0.0)
    for first_ms in (1.0, 1000.0):
        profile = tool.predictor.latency.times = Profile()
        for _ in range(16):
            profile.note(FIRST, 1, first_ms)
            for index in range(1, 4):
                profile.note(stage_step(index), 1, 10 * first_ms, first_ms)
        result = tool.count(images[0], deadline_ms=3000)
        assert [r.exit for r in result.exits] == (SERVED if first_ms == 1.0 else ["V1"])


def test_what_is_not_known_does_not_fit(counter, images):
    tool = slow(counter.network, 0, 0, 0, 0)
    tool.predictor.latency.profile = tool.predictor.latency.times
    assert tool.count(images[0], deadline_ms=60_000, policy=DeepestThatFits()).chosen.exit == "V1"


def test_the_machine_is_measured_once(counter, images, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 2 * 128 * 64)
    tool = slow(counter.network, 0, 0, 0, 0)
    result = tool.count(images[0], deadline_ms=60_000, policy=DeepestThatFits())
    assert result.chosen.exit == "final"
    (kept,) = (tmp_path / "crowdexit" / "profiles").iterdir()
    steps = json.loads(kept.read_text())["times"]
    assert set(steps) == {
        *map(stage_step, range(4)),
        *map(exit_step, counter.network.exit_names),
        PREPARING,
        LAYING,
    }
    assert {len(rows) for step, rows in steps.items() if step != PREPARING} == {2}
    again = slow(counter.network, 0, 0, 0, 0)
    _ = again.profile
    assert again.chain.ran == []
    kept.write_text("{")
    damaged = slow(counter.network, 0, 0, 0, 0)
    _ = damaged.profile
    assert damaged.chain.ran
    assert json.loads(kept.read_text())["times"]


def test_warming_up_is_not_measuring(counter):
    tool = slow(counter.network, 0, 0, 0, 0)
    tool.warm_up()
    assert tool.chain.ran == [0, "V1", 1, "AV1", 2, "AV2", 3, "final"]
    assert tool.predictor.latency.times.ms(FIRST) is None


def budgeted(counter, tmp_path, monkeypatch):
    """A slow counter that has been measured, with expected errors."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 2 * 128 * 64)
    intervals = Intervals(0.9, WIDTHS, WIDTHS, 20, ERRORS, ERRORS)
    return slow(counter.network, 0.01, 0.01, 0.01, 0.01, intervals=intervals)


def test_budget_on_images(counter, images, log_mels, tmp_path, monkeypatch):
    tool = budgeted(counter, tmp_path, monkeypatch)
    pairs = list(zip(images, log_mels, strict=True))
    rich = list(tool.count_many([*pairs, None], budget_ms=600_000))
    assert rich.pop() is None
    for result, pair in zip(rich, pairs, strict=True):
        assert result.chosen.exit == "final"
        assert result.count == pytest.approx(tool.count(*pair).count, rel=1e-4)
    least = len(images) * sum(tool.profile.ms(step) for step in (FIRST, exit_step("V1"), PREPARING)) / 2
    with pytest.raises(BudgetError, match="too small for 7 images: their first exits alone take about"):
        list(tool.count_many(iter(pairs), budget_ms=least / 3, number=7))
    for options, line in [
        ({"budget_ms": 5e5, "policy": Confident(3.0)}, "cannot be combined with a policy"),
        ({"budget_ms": 5e5}, "needs the number"),
    ]:
        with pytest.raises(CounterError, match=line):
            list(tool.count_many(iter(pairs), **options))
    with pytest.raises(BudgetError, match="is not positive"):
        list(tool.count_many(pairs, budget_ms=0))
    assert list(tool.count_many([], budget_ms=5.0)) == []
    with pytest.raises(BudgetError, match="exit V1 is not calibrated"):
        list(slow(counter.network, 0, 0, 0, 0).count_many(pairs, budget_ms=1e6))


def test_a_profile_of_a_busy_machine_refuses_no_budget(counter, images, tmp_path, monkeypatch):
    """It is measured again before anybody is refused by it; who is refused then is refused at once."""
    tool = budgeted(counter, tmp_path, monkeypatch)
    first = tool.profile
    busy = Profile(first._path, first._key)
    for step in (FIRST, PREPARING, LAYING):
        busy.note(step, 1, 1e6)
    for step in (*map(stage_step, range(1, 4)), *map(exit_step, counter.network.exit_names)):
        busy.note(step, 1, 1e6, 1e6)
    busy.write()
    later = slow(counter.network, 0.01, 0.01, 0.01, 0.01, intervals=tool.intervals)
    assert later.profile.ms(FIRST) == 1e6
    pairs = [(image, None) for image in images]
    assert [result.chosen.exit for result in later.count_many(pairs, budget_ms=60_000)] == ["final"] * len(pairs)
    assert later.profile.ms(FIRST) < 1000
    (kept,) = (tmp_path / "cache" / "crowdexit" / "profiles").iterdir()
    assert max(json.loads(kept.read_text())["times"][FIRST]["1"]) < 1000
    runs = len(later.chain.ran)
    with pytest.raises(BudgetTooSmall):
        list(later.count_many(pairs, budget_ms=1))
    assert len(later.chain.ran) == runs


def test_overrun_budget_is_reported(counter, tmp_path, monkeypatch, caplog):
    """The last image comes late: there is nothing left to give up."""
    tool = budgeted(counter, tmp_path, monkeypatch)

    def slow_to_come():
        for number in range(4):
            time.sleep(1.0 if number == 3 else 0.0)
            yield np.zeros((64, 128, 3), np.uint8), None

    assert len(list(tool.count_many(slow_to_come(), budget_ms=800, number=4))) == 4
    assert "ms instead of 800, the machine was slower than measured" in caplog.text


def test_large_images_fill_a_window_by_their_rows(counter, tmp_path, monkeypatch):
    """A window of eight rows holds as many images as their tiles fill, not eight."""
    tool = budgeted(counter, tmp_path, monkeypatch)
    monkeypatch.setattr(collate, "PIXELS_IN_FLIGHT", 8 * 128 * 64)
    taken = []

    def large():
        for number in range(6):
            taken.append(number)
            yield np.full((512, 1024, 3), 40 * number, np.uint8), None

    results = tool.count_many(large(), budget_ms=600_000, number=6)
    first = next(results)
    tiles = len(tile_boxes(1024, 512, tool.size))
    assert 2 <= tiles < 8
    assert len(taken) == -(-8 // tiles)
    expected = [tool.count(np.full((512, 1024, 3), 40 * number, np.uint8)).count for number in range(6)]
    assert [first.count, *(result.count for result in results)] == pytest.approx(expected, rel=1e-4)


FALLING = {"V1": 0.6, "AV1": 0.3, "AV2": 0.2, "final": 0.15}


@pytest.mark.parametrize("ms_per_image", [42.0, 60.0])
def test_medium_budget_is_met_and_used(counter, tmp_path, monkeypatch, ms_per_image):
    """Forty images of which a stage takes 20 ms each: between 20 ms an image for the first exit and 80 for all."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(collate, "PIXELS_PER_BATCH", 2 * 128 * 64)
    monkeypatch.setattr(collate, "PIXELS_IN_FLIGHT", 16 * 128 * 64)
    intervals = Intervals(0.9, WIDTHS, {}, 20, FALLING)
    tool = slow(counter.network, 0.02, 0.02, 0.02, 0.02, intervals=intervals, a_row=True)
    random = np.random.default_rng(0)
    # The brighter, the more people; in no order, so that who comes when the time runs short is left to chance.
    bright = random.permutation(40)
    pairs = [(random.integers(0, 30 + 5 * i, (64, 128, 3), np.uint8), None) for i in bright]
    _ = tool.profile
    budget_ms = len(pairs) * ms_per_image
    begun = time.perf_counter()
    results = list(tool.count_many(pairs, budget_ms=budget_ms))
    took = 1000 * (time.perf_counter() - begun)
    # A tenth of a second for what else the machine does.
    assert abs(took - budget_ms) <= 0.05 * budget_ms + 100
    assert len({result.chosen.exit for result in results}) > 1
    deep = [r.exits[0].count for r in results if r.chosen.exit != "V1"]
    shallow = [r.exits[0].count for r in results if r.chosen.exit == "V1"]
    assert not shallow or np.mean(deep) > np.mean(shallow)


def test_a_budget_too_small_for_the_first_exits_shows_on_the_way(counter, tmp_path, monkeypatch):
    """The profile thinks preparing is quick; these images are slow to come."""
    tool = budgeted(counter, tmp_path, monkeypatch)
    asked = []

    def slow_to_come():
        for number in range(100):
            asked.append(number)
            time.sleep(0.1)
            yield np.zeros((64, 128, 3), np.uint8), None

    counts = []
    with pytest.raises(BudgetError, match="too small for 100 images: their first exits alone take about"):
        counts.extend(tool.count_many(slow_to_come(), budget_ms=3000, number=100))
    assert len(asked) < 20
    assert [result.chosen.exit for result in counts] == ["V1"] * len(counts)  # what was answered by then is not lost
    assert 0 < len(counts) < len(asked)


def test_a_budget_for_a_folder(counter, images, tmp_path, monkeypatch, capsys):
    tool = budgeted(counter, tmp_path, monkeypatch)
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images):
        cv2.imwrite(str(folder / f"{number}.png"), image)
    (folder / "4.png").write_bytes(b"no picture")
    (folder / "5.wav").write_bytes(b"no sound")
    assert count_inputs(tool, [folder], CountOptions(budget_ms=600_000, format="json")) == 6
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["source"][-5:] for row in rows] == ["0.png", "1.png", "2.png", "3.png", "5.png", "6.png"]
    assert {row["chosen_exit"] for row in rows} == {"final"}
    assert sorted(line.split(":")[0] for line in err.splitlines()) == ["skipped", "warning"]
    with pytest.raises(BudgetError, match="too small for 7 images"):
        count_inputs(tool, [folder], CountOptions(budget_ms=0.01))
    for options in ({"exit": "V1"}, {"deadline_ms": 5.0}, {"policy": Confident(3.0)}, {"density": tmp_path / "maps"}):
        with pytest.raises(OptionError, match="a budget chooses the exits itself"):
            count_inputs(tool, [folder], CountOptions(budget_ms=1e6, **options))
    (tmp_path / "v.mp4").write_bytes(b"no film")
    with pytest.raises(OptionError, match="a video has none"):
        count_inputs(tool, [folder, tmp_path / "v.mp4"], CountOptions(budget_ms=1e6))


def test_a_folder_in_which_some_come_too_late(counter, images, tmp_path, capsys):
    tool = slow(counter.network, 0.5, 0, 0, 0)
    for number in range(2):
        cv2.imwrite(str(tmp_path / f"{number}.png"), images[number])
    with pytest.raises(SourceError, match="none of the files could be counted"):
        count_inputs(tool, [tmp_path], CountOptions(deadline_ms=20, late="fail"))
    assert capsys.readouterr().err.count("no exit answered within 20 ms") == 2
    with pytest.raises(DeadlineMissed, match=r"0\.png: no exit answered"):
        count_inputs(tool, [tmp_path / "0.png"], CountOptions(deadline_ms=20, late="fail"))
    assert count_inputs(tool, [tmp_path / "0.png"], CountOptions(deadline_ms=20)) == 1
    assert "chosen, late" in capsys.readouterr().out


def test_policies_by_name():
    assert policy_named("anytime") is ANYTIME
    assert policy_named("fits") == DeepestThatFits()
    assert policy_named("confident") == Confident(share=0.5)
    assert policy_named("confident", "15") == Confident(15.0)
    assert policy_named("confident", "7.5%") == Confident(share=0.075)
    for name, within, line in [
        ("lazy", None, "no policy 'lazy'"),
        ("fits", "15", r"a bound \(15\) is for the policy confident"),
        *(("confident", wrong, "use people") for wrong in ("", "0", "-3", "nan%", "inf", "20%%", "x", "5 %x")),
    ]:
        with pytest.raises(PolicyError, match=line):
            policy_named(name, within)
    with pytest.raises(PolicyError, match="must be positive"):
        Confident()


def test_nobody_is_confident_without_intervals(counter, images):
    with pytest.raises(CounterError, match="tiny has no intervals to decide confidence with"):
        counter.count(images[0], policy=Confident(5.0))
    with pytest.raises(CounterError, match="tiny has no intervals"):
        counter.count_many([(images[0], None)], policy=Confident(5.0))
