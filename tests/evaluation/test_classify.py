"""A classifier calibrated, and leaving when it is sure: in a batch as alone, and as the analysis foretells."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from crowdexit.calibration.temperatures import Temperatures
from crowdexit.cli.main import app
from crowdexit.data.classes import ClassStore, write_classes
from crowdexit.errors import CrowdExitError
from crowdexit.evaluation import classify
from crowdexit.evaluation.classify import EarlyExitRule
from crowdexit.evaluation.evaluate import evaluate_file
from crowdexit.evaluation.leaving import leaving
from crowdexit.models import zoo
from crowdexit.runtimes.eager import Eager

TINY = {"size": [16, 16], "patch": 4, "dim": 24, "depth": 3, "heads": 3, "outputs": 3}
EXITS = (zoo.ExitSpec("1", "1", "mlp"), zoo.ExitSpec("2", "2", "mlp"))


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("classes") / "colours.h5"
    with write_classes(path, ["red", "green", "blue"], "made for a test") as writer:
        labels = np.arange(80) % 3
        images = random.integers(0, 255, (80, 16, 16, 3), np.uint8)
        for split in ("train", "val"):
            writer.add(split, images, labels, [f"{split}{i}" for i in range(80)])
    return path


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    spec = zoo.Spec("vit-ti16", EXITS, {**TINY, "hidden": 8})
    network = zoo.build(spec)
    with torch.no_grad():  # fresh heads are hardly sure of anything
        for module in network.modules():
            if isinstance(module, torch.nn.Linear) and module.out_features == 3:
                module.weight.mul_(30)
    path = tmp_path / "model.safetensors"
    zoo.save(network, spec, path)
    return path


def test_calibrate_writes_temperatures(colours, checkpoint):
    before = zoo.read_tensors(checkpoint)
    report = CliRunner().invoke(app, ["calibrate", str(checkpoint), "--data", str(colours), "--runtime", "eager"])
    assert report.exit_code == 0, report.output
    assert "temperatures from 80 images" in " ".join(report.stdout.split())
    assert "confidence" in report.stdout
    made = Temperatures.from_dict(zoo.read_spec(checkpoint).meta["temperatures"])
    assert list(made.by_exit) == ["1", "2", "final"]
    assert made.samples == 80
    assert all(torch.equal(before[key], tensor) for key, tensor in zoo.read_tensors(checkpoint).items())
    # Scores say nothing here: the less sure, the better.
    assert all(value > 2 for value in made.by_exit.values())


@pytest.mark.parametrize("measure", ["confidence", "entropy"])
def test_leaving_in_a_batch_as_alone(colours, checkpoint, measure):
    network, _ = zoo.load(checkpoint)
    with ClassStore(colours) as store:
        scores, labels = classify.scores_of(Eager().ready(network), store, "val", range(80))
        temperatures = classify.calibrate(scores, labels)
        uncertainties = {name: temperatures.uncertainties(name, scores[name], measure) for name in scores}
        bound = float(np.median(uncertainties["1"]))
        how = EarlyExitRule(measure, bound, temperatures)
        said = classify.evaluate(Eager().ready(network), store, "val", range(80), leaving=how)["leaving"]
    sure = np.stack([uncertainties["1"] <= bound, uncertainties["2"] <= bound, np.ones(80, bool)])
    at = sure.argmax(0)
    assert said["left"] == pytest.approx({n: 100 * (at == i).mean() for i, n in enumerate(["1", "2", "final"])}, abs=3)
    assert 40 <= said["left"]["1"] <= 60
    right = np.stack([of.argmax(1) == labels for of in scores.values()])
    assert said["accuracy"] == pytest.approx(100 * right[at, np.arange(80)].mean(), abs=3)
    assert said["latency_ms"] > 0


def test_exiting_at_one_location_matches_the_analysis(colours):
    torch.manual_seed(1)
    exits = tuple(zoo.ExitSpec(f"1-{kind}", "1", kind) for kind in ("mlp", "vit"))
    network = zoo.build(zoo.Spec("vit-ti16", exits, {**TINY, "hidden": 8})).eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.Linear) and module.out_features == 3:
                module.weight.mul_(30)
    names = ["1-mlp", "1-vit", "final"]
    with ClassStore(colours) as store:
        chain = Eager().ready(network)
        scores, labels = classify.scores_of(chain, store, "val", range(80))
        uncertainties = {name: Temperatures().uncertainties(name, scores[name], "confidence") for name in scores}
        bound = float(np.median(uncertainties["1-mlp"])) + 1e-4
        said = classify.evaluate(
            chain, store, "val", range(80), leaving=EarlyExitRule("confidence", bound, Temperatures())
        )["leaving"]
    errors = {name: (of_exit.argmax(1) != labels).astype(float) for name, of_exit in scores.items()}
    (predicted,) = leaving(uncertainties, errors, dict.fromkeys(names, 1.0), [bound])
    assert list(uncertainties) == names
    assert said["left"] == pytest.approx({name: 100 * share for name, share in predicted.shares.items()}, abs=3)
    assert said["left"]["1-vit"] > 5
    assert said["accuracy"] == pytest.approx(100 * (1 - predicted.error), abs=3)


def test_who_has_left_is_not_computed(colours, checkpoint):
    network, _ = zoo.load(checkpoint)
    chain = Eager().ready(network)
    rows = []
    advance = chain.advance
    chain.advance = lambda index, state: rows.append(len(state.visual)) or advance(index, state)
    features = classify.inputs(torch.randn(6, 3, 16, 16))
    report = list(EarlyExitRule("confidence", 0.999, Temperatures()).run(chain, ["1", "2", "final"], features))
    assert [t.exit for t in report] == ["1"]
    assert rows == [6]


def test_evaluate_from_the_command_line(colours, checkpoint):
    arguments = ["evaluate", "--model", str(checkpoint), "--data", str(colours), "--split", "val", "--runtime", "eager"]
    said = CliRunner().invoke(app, [*arguments, "--confidence", "0.4", "--format", "json"])
    assert said.exit_code == 0, said.output
    report = json.loads(said.stdout)["leaving"]
    assert (report["measure"], report["bound"]) == ("confidence", pytest.approx(0.6))
    assert sum(report["left"].values()) == pytest.approx(100)
    table = CliRunner().invoke(app, [*arguments, "--entropy", "0.5"])
    assert "early exit at an uncertainty" in table.stdout
    both = CliRunner().invoke(app, [*arguments, "--entropy", "0.5", "--confidence", "0.5"])
    assert isinstance(both.exception, CrowdExitError)


def test_a_counter_has_no_classes_to_be_sure_of(counter, tmp_path):
    from branches import both_kinds
    from tiny import TINY as COUNTER

    path = tmp_path / "model.safetensors"
    zoo.save(counter.network, zoo.Spec("audiocsrnet-s", both_kinds(), COUNTER), path)
    with pytest.raises(CrowdExitError, match="confidence and entropy are of classes"):
        evaluate_file(path, tmp_path / "none.h5", "val", leave=("entropy", 0.5))
