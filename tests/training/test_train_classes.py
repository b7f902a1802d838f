"""A classifier through every stage: its backbone, branches, both together; what does not go with classes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import run
from typer.testing import CliRunner

from crowdexit.cli.main import app
from crowdexit.data.classes import write_classes
from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.evaluate import evaluate_file
from crowdexit.inference.counter import load
from crowdexit.models import zoo
from crowdexit.training.modules import ClassValidation, TrainingError
from crowdexit.training.recipe import Recipe

CLASSES = ["red", "green", "blue"]
TINY = {"size": [16, 16], "patch": 4, "dim": 24, "depth": 3, "heads": 3, "hidden": 8, "slvit_dim": 4, "slvit_heads": 2}
EXITS = {"kinds": ["mlp", "cnn-ignore", "slvit"], "places": [1, 2]}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Images whose class is the channel that is bright."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("classes") / "colours.h5"
    with write_classes(path, CLASSES, "made for a test") as writer:
        for split, number in (("train", 48), ("val", 12), ("test", 18)):
            labels = np.arange(number) % 3
            images = random.integers(0, 120, (number, 12, 12, 3), np.uint8)
            images[np.arange(number), :, :, labels] += 100
            writer.add(split, images, labels, [f"{split}{i}" for i in range(number)])
    return path


def classes(store, stage: str, **keys: Any) -> Recipe:
    content = {
        "stage": stage,
        "model": "vit-ti16",
        "changes": TINY,
        "loss": "cross-entropy",
        "epochs": 8,
        "batch": 8,
        "precision": "32-true",
        "data": {"store": store, "workers": 0, **keys.pop("data", {})},
        "optimiser": {"lr": 3e-3, "schedule": "cosine", "clip": 5.0, **keys.pop("optimiser", {})},
        **({} if stage == "classes" else {"exits": EXITS}),
        **keys,
    }
    return Recipe.model_validate(content)


@pytest.fixture(scope="module")
def trained(colours, tmp_path_factory):
    out = tmp_path_factory.mktemp("backbone")
    run(classes(colours, "classes", ema=0.5), out)
    return out


def test_a_backbone_learns_its_classes(trained):
    network, spec = zoo.load(trained)
    assert network.classifies
    assert network.config.outputs == 3
    assert spec.meta["classes"] == CLASSES
    assert spec.meta["validation"]["final"]["accuracy"] == 100
    assert spec.meta["validation"]["final"]["error"] == 0


@pytest.mark.parametrize("stage", ["branches", "end-to-end", "layer-wise"])
def test_branches_learn_them_too(colours, trained, tmp_path, stage):
    exits = EXITS if stage == "branches" else [{"name": "one", "place": 1, "kind": "mlp"}]
    ways = {"optimiser": {"rates": [3e-3, 1e-6]}} if stage == "branches" else {}
    run(classes(colours, stage, start=trained, exits=exits, **ways), tmp_path)
    network, spec = zoo.load(tmp_path)
    assert spec.meta["classes"] == CLASSES
    tables = spec.meta["validation"]
    # A third is chance; the last phase of layer-wise training validates the final exit alone.
    assert all(tables[name]["accuracy"] > 60 for name in network.exit_names if name in tables)
    assert "final" in tables or stage == "branches"
    if stage == "branches":
        assert len(tables) == 6
        assert all(table["lr"] == 3e-3 for table in tables.values())


def test_evaluate_gives_every_exits_accuracy(colours, trained, tmp_path):
    run(classes(colours, "branches", start=trained, epochs=2), tmp_path)
    arguments = ["--model", str(tmp_path), "--data", str(colours), "--split", "test"]
    result = CliRunner().invoke(app, ["evaluate", *arguments, "--format", "json", "--runtime", "eager"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["samples"] == 18
    assert [row["exit"] for row in said["exits"]] == zoo.load(tmp_path)[0].exit_names
    assert said["exits"][-1]["accuracy"] == 100
    assert all(row["latency_ms"] > 0 for row in said["exits"])
    table = CliRunner().invoke(app, ["evaluate", *arguments, "--ids", "test1*"])
    assert "accuracy" in table.stdout
    assert "(9 images)" in " ".join(table.stdout.split())  # a title is folded to its table's width
    traded = CliRunner().invoke(app, ["tradeoff", *arguments, "--out", str(tmp_path / "t")])
    assert traded.exit_code == 0, traded.output
    assert "wrong answers, %" in (tmp_path / "t" / "tradeoff.md").read_text("utf-8")


def test_scores_that_are_not_finite_are_no_class():
    validation = ClassValidation()
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    validation.add("final", ["a", "b", "c"], scores, torch.tensor([0, 1, 0]))
    assert validation.collect()["final"] == pytest.approx({"accuracy": 200 / 3, "error": 1 / 3})
    scores[2] = math.nan
    validation.add("final", ["a", "b", "c"], scores, torch.tensor([0, 1, 0]))
    assert math.isnan(validation.collect()["final"]["error"])


def test_evaluation_from_python_wants_no_progress(colours, trained):
    said = evaluate_file(trained, colours, "test", "test1*", runtime="eager")
    assert (said["samples"], said["exits"][0]["accuracy"]) == (9, 100)


@pytest.mark.parametrize(
    ("stage", "keys", "problem"),
    [
        ("classes", {"loss": "mae"}, "'mae' is not for the stage 'classes'"),
        ("count", {"exits": ()}, "'cross-entropy' is not for the stage 'count'"),
        ("branches", {"local": 1.0}, "'local' applies to counting only"),
    ],
)
def test_recipes_that_mean_nothing(colours, stage, keys, problem):
    with pytest.raises(ValueError, match=problem):
        classes(colours, stage, **keys)


def test_counting_and_classes_are_not_mixed(colours, store, trained, tmp_path):
    with pytest.raises(TrainingError, match="vit-ti16 wants the loss 'cross-entropy', not 'mae'"):
        run(classes(colours, "branches", start=trained, loss="mae"), tmp_path / "1")
    with pytest.raises(CrowdExitError, match="not a prepared classification set"):
        run(classes(store, "classes"), tmp_path / "2")
    with pytest.raises(TrainingError, match="no split 'nowhere' to validate with"):
        run(classes(colours, "classes", data={"val": "nowhere"}), tmp_path / "3")
    with pytest.raises(CrowdExitError, match="is a classifier; it does not count"):
        load(trained)
    for extra, problem in (
        (["--brightness", "0.5"], "are for counting"),
        (["--ids", "nothing*"], "no image of val matches"),
        (["--split", "other"], "no split 'other'"),
    ):
        said = CliRunner().invoke(
            app, ["evaluate", "--model", str(trained), "--data", str(colours), "--split", "val", *extra]
        )
        assert isinstance(said.exception, CrowdExitError)
        assert problem in str(said.exception)
