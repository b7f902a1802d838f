"""Tables of trained runs: every figure in its cell, the paper's beside them."""

from __future__ import annotations

import csv

import cv2
import pytest

from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.tables import as_markdown, data_of, figures, write
from crowdexit.models import zoo


def spec_of(stage, exits, store="crowd.h5", others=()):
    """A run's description: exits as (kind, place); ``others`` stood on its start."""
    named = [{"name": f"{place}-{kind}", "place": place, "kind": kind} for kind, place in exits]
    meta = {"recipe": {"stage": stage, "data": {"store": store}, "exits": named}}
    return zoo.Spec("transcrowd-token-s", tuple(zoo.ExitSpec(**e) for e in [*others, *named]), {}, meta)


def cells(markdown, title):
    """{row: [cells]} of the table under a heading."""
    part = markdown.split(f"## {title}")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


def some():
    made = []
    for kind, values in (("mlp", (30.0, 20.0)), ("mlp", (32.0, 21.0)), ("vit", (25.0, 19.0))):
        run = spec_of("end-to-end", [(kind, "6")])
        made += figures(run, "crowd", {f"6-{kind}": values[0], "final": values[1]}, "MAE")
    classes = spec_of("end-to-end", [("vit", "6")], "cifar.h5")
    made += figures(classes, "cifar", {"6-vit": 61.0, "final": 64.0}, "accuracy")
    made += figures(spec_of("count", []), "crowd", {"final": 18.0}, "MAE")
    three = spec_of("layer-wise", [("vit", "9"), ("vit", "10"), ("vit", "3")])
    return made + figures(three, "crowd", {"3-vit": 50, "9-vit": 40, "10-vit": 39, "final": 30}, "MAE")


def test_each_figure_in_its_cell():
    text = as_markdown(some())
    ours, paper = text.split("The paper's table I")
    assert cells(ours, "End-to-end, branches after layer 6") == {
        "branch": ["crowd, MAE @6", "crowd, MAE final", "cifar, accuracy @6", "cifar, accuracy final"],
        "MLP-EE": ["31.00 ± 1.41", "20.50 ± 0.71", "–", "–"],
        "ViT-EE": ["25.00", "19.00", "61.00", "64.00"],
    }
    assert "Backbones without exits: crowd 18.00." in ours
    assert cells(text, "Layer-wise, branches after layers 3, 9, 10")["ViT-EE"] == ["50.00", "40.00", "39.00", "30.00"]
    assert text.count("The paper's table I") == 1
    assert "| ViT-EE | 95.89 | 96.99 | 85.23 | 89.44 | 94.39 | 94.84 | 11.06 | 11.01 |" in paper


def test_what_stood_there_before_is_not_the_runs():
    old = {"name": "old", "place": "2", "kind": "mlp"}
    made = figures(
        spec_of("branches", [("vit", "6")], others=[old]), "crowd", {"old": 1, "6-vit": 2, "final": 3}, "MAE"
    )
    assert {(f.kind, f.place, f.value) for f in made} == {("vit", "6", 2), ("vit", "final", 3)}
    assert made[0].strategy == "classifier-wise"


def test_two_branches_for_one_cell():
    meta = {"stage": "branches", "exits": [{"name": name, "place": "6", "kind": "vit"} for name in ("a", "b")]}
    exits = tuple(zoo.ExitSpec(name, "6", "vit") for name in ("a", "b"))
    spec = zoo.Spec("transcrowd-token-s", exits, {}, {"recipe": meta})
    with pytest.raises(CrowdExitError, match="one cell"):
        figures(spec, "crowd", {"a": 1, "b": 2, "final": 3}, "MAE")
    with pytest.raises(CrowdExitError, match="does not record"):
        data_of(zoo.Spec("transcrowd-token-s"))


def test_files(tmp_path):
    made = some()
    paths = write(made, tmp_path / "new")
    assert [path.name for path in paths] == ["table.csv", "table.md", "table.png"]
    rows = list(csv.DictReader(paths[0].open()))
    assert len(rows) == len(made)
    assert rows[0] == {
        "strategy": "end-to-end",
        "places": "6",
        "data": "crowd",
        "measure": "MAE",
        "branch": "mlp",
        "exit": "6",
        "value": "30.0000",
    }
    assert cv2.imread(str(paths[2])).shape[1] > 1000
    with pytest.raises(CrowdExitError, match="no table"):
        write([f for f in made if not f.strategy], tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CrowdExitError, match="cannot be written"):
        write(made, tmp_path / "file")
