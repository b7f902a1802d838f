"""A suite: a table's experiments as one command, that goes on where it was and outlives what fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from tiny_runs import TINY
from typer.testing import CliRunner

from crowdexit.cli.main import app
from crowdexit.data.classes import write_classes
from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.training.recipe import Recipe
from crowdexit.training.suite import bundled, described, merged, read_suite, run_all, runs_of

SUITE = {
    "title": "Tiny",
    "paper": "IV",
    "train": {"stage": "classes", "loss": "cross-entropy", "epochs": 1, "batch": 8, "data": {"workers": 0}},
    "branches": {"loss": "cross-entropy", "epochs": 1, "batch": 8, "data": {"workers": 0}},
    "copycat": {"epochs": 1},
    "backbones": {
        "resnet152": {"train": {"model": "resnet18", "changes": {"size": [32, 32], "outputs": 2, "dim": 4, "heads": 1}}}
    },
}


@pytest.fixture
def data(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "classes.h5"
    with write_classes(path, ["dark", "light"], "made up") as writer:
        for split, many in (("train", 16), ("val", 4), ("test", 6)):
            labels = np.arange(many) % 2
            noise = rng.integers(0, 60, (many, 32, 32, 3))
            images = (noise + 180 * labels[:, None, None, None]).astype(np.uint8)
            writer.add(split, images, labels, [f"{split}{i}" for i in range(many)])
    return path


def written(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**SUITE, **changes}))
    return path


def test_a_table_in_one_command_that_is_not_run_twice(tmp_path, data):
    arguments = ["suite", str(written(tmp_path)), "--data", str(data), "--out", str(tmp_path / "out"), "--seeds", "2"]
    arguments += ["--pictures", str(data), "--jobs", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    table = (tmp_path / "out" / "table.md").read_text()
    header, _, first, second = table.splitlines()[2:6]
    assert "CC-SL-ViT, accuracy" in header
    assert first.startswith("| resnet152 | 1 | ")
    assert first.endswith("| 66.78 | 71.06 |")
    assert second.endswith("| 79.31 | 81.18 |")
    assert first.count("±") == 4  # two methods, plain and copycat, two seeds each
    assert (tmp_path / "out" / "table.png").stat().st_size > 1000
    # The figures are what the checkpoints reach on the test images.
    run = tmp_path / "out" / "resnet152" / "branches-0"
    report = json.loads((run / "test.json").read_text())
    assert (report["split"], report["samples"]) == ("test", 6)
    spec = zoo.read_spec(run / "model.safetensors")
    assert [e.name for e in spec.exits] == ["1-cnn", "1-slvit", "2-cnn", "2-slvit"]
    # Again: nothing is trained.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    assert len(before) == 5
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    # What cannot be evaluated is missing from the table, and named; the rest is there.
    broken = tmp_path / "out" / "resnet152" / "branches-1"
    (broken / "test.json").unlink()
    (broken / "model.safetensors").write_bytes(b"")
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CrowdExitError)
    assert "1 of 5 runs failed (resnet152/branches-1)" in str(result.exception)
    first = (tmp_path / "out" / "table.md").read_text().splitlines()[4]
    assert first.startswith("| resnet152 | 1 | ")
    assert first.count("±") == 2  # copycat alone has two seeds left


def counting_suite(tmp_path: Path) -> Path:
    """Table VIII at a tiny size: a stage two network, with the dense layer in place of the sum."""
    spec = zoo.Spec("audiocsrnet-s", changes={**TINY, "regressor": True})
    zoo.save(zoo.build(spec), spec, tmp_path / "start.safetensors")
    settings = {"loss": "mae", "epochs": 1, "batch": 4, "precision": "32-true", "watch": "audio"}
    return written(
        tmp_path,
        paper="VIII",
        backbones={"audiocsrnet": {"start": str(tmp_path / "start.safetensors")}},
        branches={"model": "audiocsrnet-s", "data": {"workers": 0, "whole": True, "hear": 1.0}, **settings},
        places=["V1", "AV1", "AV2"],
    )


def test_table_viii_of_a_network_with_its_dense_layer(tmp_path, store):
    arguments = ["suite", str(counting_suite(tmp_path)), "--data", str(store), "--split", "val", "--seeds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    header, _, *rows = (tmp_path / "out" / "table.md").read_text().splitlines()[2:7]
    assert "FLOPS SL-ViT" in header
    for place, row in zip(("V1", "AV1", "AV2"), rows, strict=True):
        assert row.startswith(f"| audiocsrnet | {place} | ")
        assert "–" not in row, "every figure and every cost is there"


def test_what_a_table_costs_is_known_before_anything_is_trained(tmp_path, store, monkeypatch):
    def fails(*_):
        raise RuntimeError("no such cost")

    monkeypatch.setattr("crowdexit.evaluation.cost.cost_of", fails)
    arguments = ["suite", str(counting_suite(tmp_path)), "--data", str(store), "--split", "val", "--seeds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert str(result.exception) == "no such cost"
    assert not list(tmp_path.glob("out/**/model.safetensors"))


@pytest.mark.parametrize("name", ["table-iv", "small-digits", "shanghaitech"])
def test_a_run_is_described_before_it_is_trained(tmp_path, name):
    runs = runs_of(read_suite(name), tmp_path / "data.h5", tmp_path / "out", 1)
    for run in (run for run in runs if run.step == "branches"):
        spec = described(run, runs)
        assert [(e.name, e.kind) for e in spec.exits] == [(e["name"], e["kind"]) for e in run.recipe["exits"]]
        with torch.device("meta"):
            assert len(zoo.build(spec).exit_names) == len(spec.exits) + 1


def test_what_fails_stops_nothing_else(tmp_path, data):
    backbones = {"bad": {"train": {"model": "resnet18", "changes": {"size": [32, 32], "stride": "last"}}}}
    path = written(tmp_path, backbones={**backbones, **SUITE["backbones"]})
    result = CliRunner().invoke(
        app, ["suite", str(path), "--data", str(data), "--out", str(tmp_path / "out"), "--seeds", "1"]
    )
    assert isinstance(result.exception, CrowdExitError)
    assert "2 of 4 runs failed (bad/backbone, bad/branches-0)" in str(result.exception)
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| resnet152 | 2 |" in table
    assert "bad" not in table
    assert "stride 'last'" in (tmp_path / "out" / "bad" / "backbone" / "log.txt").read_text()


def test_what_ends_the_suite_ends_its_trainings(tmp_path, data):
    path, out = written(tmp_path, train={**SUITE["train"], "epochs": 10_000}), tmp_path / "out"
    command = [sys.executable, "-m", "crowdexit", "suite", str(path), "--data", str(data), "--out", str(out)]
    suite = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = out / "resnet152" / "backbone" / "log.txt"
    try:
        while "epoch 1/" not in (log.read_text() if log.exists() else ""):
            assert suite.poll() is None
            time.sleep(0.1)
    finally:
        suite.send_signal(signal.SIGTERM)
    assert suite.wait() == 143
    with FileLock(log.parent / "training.lock", timeout=20):  # its training has let go of it
        assert not (log.parent / "finished").exists()


def test_a_folder_of_another_recipe_is_left_alone(tmp_path, data):
    suite = read_suite(written(tmp_path))
    (tmp_path / "out" / "resnet152" / "backbone").mkdir(parents=True)
    (tmp_path / "out" / "resnet152" / "backbone" / "recipe.yaml").write_text("stage: classes\n")
    with pytest.raises(CrowdExitError, match="another recipe"):
        run_all(runs_of(suite, data, tmp_path / "out", 1), tmp_path / "out", 1, lambda run, problem: None)


@pytest.mark.parametrize("name", bundled())
def test_bundled_suites_make_recipes(name, tmp_path):
    suite = read_suite(name)
    runs = runs_of(suite, tmp_path / "data.h5", tmp_path / "out", 5, tmp_path / "pictures")
    recipes = {run.name: Recipe.model_validate(run.recipe) for run in runs}
    trained = sum(run.step == "branches" for run in runs)
    assert trained == 5 * len(suite.backbones)
    for run in runs:
        recipe = recipes[run.name]
        if run.step == "branches" and run.seed == 0:
            spec = zoo.Spec(recipe.model, changes={k: v for k, v in recipe.changes.items() if k != "dropout"})
            with torch.device("meta"):
                places = set(zoo.build(spec).places)
            assert {e.place for e in recipe.exits} == set(suite.places) <= places


def test_the_scenarios_are_the_papers_27():
    classes = [read_suite(f"table-{number}") for number in ("iv", "v", "vi", "vii")]
    assert sum(len(suite.backbones) * len(suite.places) for suite in classes) == 24
    assert len(read_suite("table-viii").places) == 3
    music = branches_of("table-vii")["resnet152"]
    assert {e["name"]: e["options"] for e in music["exits"]}["2-slvit"]["heads"] == 24
    assert music["batch"] == 32


def branches_of(suite: str) -> dict[str, dict]:
    runs = runs_of(read_suite(suite), Path("data.h5"), Path("out"), 1)
    return {run.backbone: run.recipe for run in runs if run.step == "branches"}


def test_one_branch_of_the_papers_has_no_last_residual_connection():
    without = [
        (suite, backbone, e["name"])
        for suite in ("table-iv", "table-v", "table-vi", "table-vii", "table-viii")
        for backbone, recipe in branches_of(suite).items()
        for e in recipe["exits"]
        if not e["options"].get("second_residual", True)
    ]
    assert without == [("table-vii", "resnet152", "2-slvit")]


def test_one_backbone_can_teach_all(tmp_path):
    """Table IX: what copycat labels is labelled by InceptionV3, whichever backbone the branches stand on."""
    runs = runs_of(read_suite("table-iv"), Path("cifar10.h5"), tmp_path, 1, Path("tiny-imagenet"))
    copycat = {run.backbone: run for run in runs if run.step == "copycat"}
    teacher = str(tmp_path / "inceptionv3" / "backbone" / "model.safetensors")
    assert list(copycat) == ["resnet152", "densenet201", "inceptionv3"]
    for backbone, run in copycat.items():
        assert run.recipe["copycat"]["teacher"] == teacher
        assert run.needs == (f"{backbone}/branches-0", "inceptionv3/backbone")
    others = runs_of(read_suite("table-v"), Path("cifar100.h5"), tmp_path, 1, Path("tiny-imagenet"))
    assert all("teacher" not in run.recipe["copycat"] for run in others if run.step == "copycat")


def test_parts_lie_over_each_other():
    assert merged({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 4}, "d": {"e": 5}}) == {
        "a": {"b": 4, "c": 2},
        "d": {"e": 5},
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbones": {}}, "backbones"),
        ({"datasets": "x"}, "datasets"),
        ({"dataset": "mnist"}, "dataset: 'mnist'"),
        ({"teacher": "resnet18"}, "teacher 'resnet18' is none of its backbones"),
        ({"train": {**SUITE["train"], "epochs": 0}}, "resnet152/backbone: epochs"),
    ],
)
def test_a_suite_that_means_nothing(tmp_path, data, changes, message):
    with pytest.raises(CrowdExitError, match=message):
        runs_of(read_suite(written(tmp_path, **changes)), data, tmp_path, 1)


def test_no_such_suite():
    with pytest.raises(CrowdExitError, match="bundled are"):
        read_suite("table-iii")


def test_data_that_is_not_there_is_said_once(tmp_path):
    arguments = ["suite", str(written(tmp_path)), "--data", str(tmp_path / "no.h5"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, CrowdExitError)
    assert "no.h5: no such prepared file" in str(result.exception)
    assert not (tmp_path / "out").exists()
