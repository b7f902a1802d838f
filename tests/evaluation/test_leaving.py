"""What leaving when sure is worth, against a count by hand."""

from __future__ import annotations

import numpy as np
import pytest

from crowdexit.evaluation import tradeoff
from crowdexit.evaluation.leaving import costs_on_the_way, leaving
from crowdexit.models import zoo

EXITS = tuple(zoo.ExitSpec(str(layer), str(layer), "mlp") for layer in (1, 6))


def test_by_hand():
    uncertainties = {"a": np.array([0.1, 0.5, 0.9, 0.2]), "final": np.array([0.3, 0.9, 0.0, 0.0])}
    errors = {"a": np.array([1.0, 1.0, 1.0, 0.0]), "final": np.array([0.0, 1.0, 0.0, 0.0])}
    made = leaving(uncertainties, errors, {"a": 10.0, "final": 30.0}, [0.05, 0.2, 0.5, 1.0])
    assert [point.error for point in made] == [0.25, 0.5, 0.5, 0.75]
    assert [point.cost for point in made] == [30, 20, 15, 10]
    assert [point.shares["a"] for point in made] == [0, 0.5, 0.75, 1]
    assert all(sum(point.shares.values()) == 1 for point in made)


def test_whoever_goes_on_has_paid_for_the_exits_before():
    spec = zoo.Spec("transcrowd-token-s", EXITS, {"size": [96, 96], "audio_width": 0})
    costs = costs_on_the_way(spec, ["1", "6", "final"])
    alone = costs_on_the_way(spec, ["6"])["6"]
    mlp = costs["6"] - alone
    assert alone == tradeoff.costs(spec)["6"]
    assert 0 < mlp < 0.01 * costs["6"]
    assert costs["final"] == pytest.approx(costs_on_the_way(spec, ["final"])["final"] + 2 * mlp)
