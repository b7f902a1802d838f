"""Training images that a run left out, counted by it: the table, and the intervals that take their shape of it."""

from __future__ import annotations

import csv
from dataclasses import replace

import cv2
import numpy as np
import pytest
from tiny import TINY

from crowdexit.calibration.intervals import Intervals
from crowdexit.cli.main import app
from crowdexit.data.folds import in_fold
from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from crowdexit.evaluation.cross_fit import CrossFitError, read_counts
from crowdexit.inference.counter import load
from crowdexit.models import zoo
from crowdexit.utils import command

TRAIN = [f"A_{number}" for number in range(60)]


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    path = tmp_path_factory.mktemp("crowd") / "crowd.h5"
    random = np.random.default_rng(0)
    with open_for_writing(path) as file:
        for split, ids in (("train", TRAIN), ("val", [f"A_{number}" for number in range(60, 72)])):
            for number, id in enumerate(ids):
                points = random.uniform(0, 60, (number, 2)).astype(np.float32)
                encoded = cv2.imencode(".png", random.integers(0, 255, (64, 128, 3), np.uint8))[1]
                write_sample(file, StoredSample(id, split, encoded, points, 128, 64, len(points)))
    return path


@pytest.fixture(scope="module")
def runs(counter, tmp_path_factory):
    """Checkpoints that say they left a third out each; the fourth left nothing out."""
    folder = tmp_path_factory.mktemp("runs")
    spec = zoo.Spec("audiocsrnet-s", (zoo.ExitSpec("V1", "V1", "slvit"),), TINY)
    network = zoo.build(spec)
    paths = []
    for fold in ("0/3", "1/3", "2/3", None):
        data = {"train": "train", "train_ids": "*", "leave_out": fold}
        paths.append(folder / str(len(paths)) / "model.safetensors")
        zoo.save(network, replace(spec, meta={"recipe": {"data": data}}), paths[-1])
    return [str(path.parent) for path in paths]


def test_folds_are_parts():
    ids = [f"{part}_IMG_{number}" for part in "AB" for number in range(1, 301)]
    sizes = [sum(in_fold(id, f"{number}/5") for id in ids) for number in range(5)]
    assert sum(sizes) == 600
    assert all(90 <= size <= 150 for size in sizes)
    assert all(sum(in_fold(id, f"{number}/3") for number in range(3)) == 1 for id in ids)
    assert in_fold("A_IMG_1", "0/3")  # the same on every machine, whenever


def test_every_image_is_counted_by_the_run_that_left_it_out(crowd, runs, tmp_path, capsys):
    out = tmp_path / "counts.csv"
    arguments = ["cross-fit", *runs[:3], "--data", str(crowd), "--out", str(out), "--runtime", "eager"]
    assert command.run(app, arguments) == 0
    assert "60 images" in capsys.readouterr().out
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert sorted({row["id"] for row in rows}) == sorted(TRAIN)
    assert [row["exit"] for row in rows] == ["V1", "final"] * 60
    assert {row["id"]: float(row["truth"]) for row in rows} == {id: number for number, id in enumerate(TRAIN)}
    counts = read_counts(out)
    assert set(counts) == {"V1", "final"}
    assert [len(values) for values in counts["V1"]] == [60, 60]
    checkpoint = tmp_path / "model.safetensors"
    checkpoint.write_bytes((zoo.checkpoint_path(runs[0])).read_bytes())
    calibrating = ["calibrate", str(checkpoint), "--data", str(crowd), "--runtime", "eager"]
    assert command.run(app, calibrating) == 0
    assert load(checkpoint).intervals.without_audio_thirds == {}  # four images a third are too few for 0.9
    assert command.run(app, [*calibrating, "--held-out", str(out)]) == 0
    made = Intervals.from_dict(zoo.read_spec(checkpoint).meta["intervals"])
    assert set(made.without_audio_thirds) == {"V1", "final"}


def test_what_cannot_be_cross_fitted(crowd, runs, tmp_path, capsys):
    for wrong, line in (
        (runs[3:], "no training images were left out; train it with data.leave_out"),
        ([runs[0], runs[0]], "was left out of another run as well"),
    ):
        arguments = ["cross-fit", *wrong, "--data", str(crowd), "--out", str(tmp_path / "c.csv"), "--runtime", "eager"]
        assert command.run(app, arguments) == 2
        (report,) = capsys.readouterr().err.splitlines()
        assert line in report
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(CrossFitError, match="not a table of crowdexit cross-fit"):
        read_counts(tmp_path / "bad.csv")
    with pytest.raises(CrossFitError, match="cannot be read"):
        read_counts(tmp_path / "none.csv")
