"""Intervals hold the truth as often as they say, and a checkpoint keeps them without a bit of its weights moved."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from branches import both_kinds
from hypothesis import given
from hypothesis import strategies as st

from crowdexit import zoo
from crowdexit.intervals import IntervalError, Intervals, width


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage(level):
    """Over many draws of 40 held-out pictures the mean coverage of a further one is the level, from above."""
    random = np.random.default_rng(0)
    held = []
    for _ in range(1500):
        truths = random.lognormal(4, 1, 41)
        counts = truths * random.lognormal(0.1, 0.3, 41)
        w = width(counts[:40], truths[:40], level)
        low, high = Intervals(level, {"final": w}).around("final", counts[40], heard=False)
        held.append(low <= truths[40] <= high)
    assert level - 0.02 < np.mean(held) < level + 0.05


@given(st.lists(st.tuples(st.floats(0, 1e4), st.floats(0, 1e4)), min_size=9, max_size=60))
def test_covers_its_share_of_what_it_was_made_of(pairs):
    counts, truths = zip(*pairs, strict=True)
    made = Intervals(0.9, {"x": width(counts, truths, 0.9)})
    inside = 0
    for count, truth in pairs:
        low, high = made.around("x", count, heard=False)
        assert 0 <= low <= count <= high
        inside += low - 1e-6 * (1 + truth) <= truth <= high + 1e-6 * (1 + truth)
    assert inside >= math.ceil(0.9 * (len(pairs) + 1))


def test_which_state():
    made = Intervals(0.9, {"V1": 0.5, "final": 0.1}, {"final": 0.2}, 40)
    assert made.around("final", 90.0, heard=False) == (80.0, 100.0)
    assert made.around("final", 90.0, heard=True) == (70.0, 110.0)
    assert made.around("V1", 1.0, heard=False) == (0.0, 6.5)
    assert made.around("V1", 1.0, heard=True) is None
    assert Intervals.from_dict(made.to_dict()) == made
    assert Intervals.from_dict(None).around("final", 5.0, heard=False) is None


def test_too_few_and_no_probability():
    with pytest.raises(IntervalError, match=r"8 pictures are too few for a level of 0\.9: it takes 9"):
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
    assert Intervals.from_dict(again.meta["intervals"]).silent == {"final": 0.2}
    assert (again.exits, again.changes) == (spec.exits, changes)
    after = zoo.read_tensors(path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert abs(path.stat().st_size - size) < 500  # still half precision
    assert list(path.parent.iterdir()) == [path]
