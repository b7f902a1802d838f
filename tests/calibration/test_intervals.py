"""Intervals hold the truth as often as they say, and a checkpoint keeps them without a bit of its weights moved."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from branches import both_kinds
from hypothesis import given
from hypothesis import strategies as st

from crowdexit.calibration.intervals import IntervalError, Intervals, thirds, width
from crowdexit.models import zoo


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage(level):
    """Over many draws of 40 held-out images the mean coverage of a further one is the level, from above."""
    random = np.random.default_rng(0)
    held = []
    for _ in range(1500):
        truths = random.lognormal(4, 1, 41)
        counts = truths * random.lognormal(0.1, 0.3, 41)
        w = width(counts[:40], truths[:40], level)
        low, high = Intervals(level, {"final": w}).around("final", counts[40], has_audio=False)
        held.append(low <= truths[40] <= high)
    assert level - 0.02 < np.mean(held) < level + 0.05


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)), min_size=9, max_size=60))
def test_covers_its_share_of_what_it_was_made_of(pairs):
    counts, truths = zip(*pairs, strict=True)
    made = Intervals(0.9, {"x": width(counts, truths, 0.9)})
    inside = 0
    for count, truth in pairs:
        low, high = made.around("x", count, has_audio=False)
        assert 0 <= low <= count <= high
        inside += low - 1e-6 * (1 + truth) <= truth <= high + 1e-6 * (1 + truth)
    assert inside >= math.ceil(0.9 * (len(pairs) + 1))


def test_which_state():
    made = Intervals(0.9, {"V1": 0.5, "final": 0.1}, {"final": 0.2}, 40)
    assert made.around("final", 90.0, has_audio=False) == (80.0, 100.0)
    assert made.around("final", 90.0, has_audio=True) == (70.0, 110.0)
    assert made.around("V1", 1.0, has_audio=False) == (0.0, 6.5)
    assert made.around("V1", 1.0, has_audio=True) is None
    assert Intervals.from_dict(made.to_dict()) == made
    assert Intervals.from_dict(None).around("final", 5.0, has_audio=False) is None


def test_too_few_and_no_probability():
    with pytest.raises(IntervalError, match=r"8 images are too few for a level of 0\.9; at least 9 are needed"):
        width([1.0] * 8, [1.0] * 8, 0.9)
    assert width([1.0] * 9, [1.0] * 9, 0.9) == 0
    for level in (0, 1, -2, float("nan")):
        with pytest.raises(IntervalError, match="no probability"):
            width([1.0] * 20, [1.0] * 20, level)


@pytest.mark.parametrize(
    "data",
    [3, {}, {"final": 0.2}, {"level": 0.9, "silent": {"a": -1}, "heard": {}, "samples": 3}, {"level": "x"}],
)
def test_damaged(data):
    with pytest.raises(IntervalError, match="the checkpoint's intervals are damaged"):
        Intervals.from_dict(data)


def test_annotate_moves_no_weight(tmp_path):
    changes = {"width": 0.0625, "audio_width": 0.0625, "size": [128, 64], "dim": 4, "heads": 2, "hidden": 8}
    spec = zoo.Spec("audiocsrnet-s", both_kinds(), changes, {"recipe": {"seed": 3}})
    path = tmp_path / "m" / "model.safetensors"
    zoo.save(zoo.build(spec), spec, path, half=True)
    before, size = zoo.read_tensors(path), path.stat().st_size
    zoo.annotate(path, intervals=Intervals(0.9, {"final": 0.2}).to_dict())
    again = zoo.read_spec(path)
    assert again.meta["recipe"] == {"seed": 3}
    assert Intervals.from_dict(again.meta["intervals"]).without_audio == {"final": 0.2}
    assert (again.exits, again.changes) == (spec.exits, changes)
    after = zoo.read_tensors(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert abs(path.stat().st_size - size) < 500  # still half precision
    assert list(path.parent.iterdir()) == [path]


def test_thirds():
    """Small counts that are far off widen the intervals of small counts alone."""
    random = np.random.default_rng(0)
    truths = np.concatenate([random.uniform(5, 50, 40), random.uniform(100, 300, 40), random.uniform(500, 900, 40)])
    counts = truths * (1 + np.repeat([0.8, 0.1, 0.3], 40) * random.uniform(-1, 1, 120))
    made = thirds(counts.tolist(), truths.tolist(), 0.9)
    low, middle, high = made.widths
    assert low > high > middle
    intervals = Intervals(0.9, {"V1": 0.5}, without_audio_thirds={"V1": made}, samples=120)
    first, second = made.bounds
    assert intervals.half_width("V1", first - 1, has_audio=False) == pytest.approx(low * (first + 9))
    assert intervals.half_width("V1", first, has_audio=False) == pytest.approx(middle * (first + 10))
    assert intervals.half_width("V1", second, has_audio=False) == pytest.approx(high * (second + 10))
    inside = [
        a <= t <= b
        for c, t in zip(counts, truths, strict=True)
        for a, b in [intervals.around("V1", c, has_audio=False)]
    ]
    for part in np.split(np.array(inside)[np.argsort(counts)], 3):
        assert 0.9 <= part.mean() <= 0.98
    assert Intervals.from_dict(intervals.to_dict()) == intervals
    assert thirds(counts[:20].tolist(), truths[:20].tolist(), 0.9) is None
    damaged = {**intervals.to_dict(), "silent_thirds": {"V1": {"bounds": [3, 2], "widths": [1, 1, 1]}}}
    with pytest.raises(IntervalError, match="the checkpoint's intervals are damaged"):
        Intervals.from_dict(damaged)


def test_the_shape_of_many_and_the_scale_of_few():
    """Networks that were trained less are twice as far off: their widths are halved, not how they compare."""
    random = np.random.default_rng(0)

    def drawn(number: int, by: float) -> tuple[list[float], list[float]]:
        truths = random.uniform(5, 900, number)
        spread = np.where(truths < 300, 0.4, 0.1)
        return (truths * (1 + by * spread * random.uniform(-1, 1, number))).tolist(), truths.tolist()

    many, few = drawn(3000, 1.0), drawn(300, 0.5)
    wide, made = thirds(*many, 0.9), thirds(*few, 0.9, many)
    assert made.bounds == wide.bounds
    assert np.array(made.widths) / wide.widths == pytest.approx([0.5] * 3, abs=0.06)
    further_counts, further = drawn(3000, 0.5)
    assert np.mean(
        [abs(c - t) <= made.at(c) * (c + 10) for c, t in zip(further_counts, further, strict=True)]
    ) == pytest.approx(0.9, abs=0.04)
