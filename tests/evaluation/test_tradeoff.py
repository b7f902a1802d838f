"""Practical branches and what to deploy, from known errors; the files that show it."""

from __future__ import annotations

import csv

import cv2
import pytest

from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.cost import cost
from crowdexit.evaluation.tradeoff import Point, TradeoffError, costs, points, recommend, write
from crowdexit.models import zoo

KINDS = ("mlp", "cnn-ignore", "vit")
SPEC = zoo.Spec(
    "transcrowd-token-s",
    tuple(zoo.ExitSpec(f"{layer}-{kind}", str(layer), kind) for layer in (1, 2, 10) for kind in KINDS),
    {"size": [96, 96], "audio_width": 0},
)


def test_costs_are_those_of_the_cost_command():
    table = cost("transcrowd-token-s", size="96x96")
    ours = costs(zoo.Spec(SPEC.model, SPEC.exits, {"size": [96, 96]}))
    for e in table.exits:
        if f"{e.exit}-{e.kind}" in ours:
            assert ours[f"{e.exit}-{e.kind}"] == e.total_macs
    assert ours["final"] == table.backbone_flops // 2


def test_practical_is_better_than_everything_cheaper():
    errors = dict(zip(costs(SPEC), (50, 40, 45, 38, 42, 20, 21, 25, 19, 20), strict=True))
    made = points(SPEC, errors)
    assert [p.macs for p in made] == sorted(p.macs for p in made)
    for p in made:
        assert p.practical == all(q.error > p.error for q in made if q.macs < p.macs)
    # At layer 1 two branches trade, the cheaper and worse, the dearer and better: both are offered.
    assert {p.exit for p in made if p.practical and p.place == "1"} == {"1-mlp", "1-cnn-ignore"}
    assert not next(p for p in made if p.exit == "final").practical


def test_recommendation():
    made = [
        Point("a", "1", "mlp", 10, 30.0, True),
        Point("b", "1", "vit", 20, 35.0, False),
        Point("c", "2", "vit", 30, 20.0, True),
    ]
    assert [(budget, p and p.exit) for budget, p in recommend(made, [9, 10, 29, 30, 1e12])] == [
        (9, None),
        (10, "a"),
        (29, "a"),
        (30, "c"),
        (1e12, "c"),
    ]
    for budget in (0, -1, float("nan")):
        with pytest.raises(TradeoffError, match="is not positive"):
            recommend(made, [budget])


def test_files(tmp_path):
    errors = {name: 100.0 - number for number, name in enumerate(costs(SPEC))}
    made = points(SPEC, errors)
    write(made, tmp_path / "new", title="A title", measure_name="MAE", budgets=[1.0, 1e12])
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["tradeoff.csv", "tradeoff.md", "tradeoff.png"]
    rows = list(csv.DictReader((tmp_path / "new" / "tradeoff.csv").open()))
    assert [(r["exit"], int(r["macs"]), float(r["error"])) for r in rows] == [(p.exit, p.macs, p.error) for p in made]
    text = (tmp_path / "new" / "tradeoff.md").read_text()
    assert "| branch | 1 | 2 | 10 |" in text
    assert "| 0.00 | none fits |  |  |" in text
    assert "| 1000.00 | final |" in text
    assert cv2.imread(str(tmp_path / "new" / "tradeoff.png")).shape[0] > 400
    with pytest.raises(TradeoffError, match="no exit with a known error"):
        write([], tmp_path, title="", measure_name="MAE")
    (tmp_path / "file").write_text("")
    with pytest.raises(CrowdExitError, match="cannot be written"):
        write(made, tmp_path / "file", title="", measure_name="MAE")
