"""Whether an image is familiar: in every output, on every runtime, in batches and tiles; and what intervals do."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from branches import both_kinds
from tiny import TINY

from crowdexit.calibration.familiarity import Familiarity, FamiliarityError
from crowdexit.calibration.intervals import Intervals
from crowdexit.cli.main import app
from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from crowdexit.inference.counter import CrowdCounter, load
from crowdexit.inference.policies import Confident
from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions
from crowdexit.models import zoo
from crowdexit.models.stages import inputs
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.selection import select_runtime
from crowdexit.utils import command

WIDTHS = dict.fromkeys(("V1", "AV1", "AV2", "final"), 0.25)


def noise(seed: int, width: int = 128, height: int = 64) -> np.ndarray:
    """An image of the training images' kind."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 255, (8, 16, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


FLAT = np.full((64, 128, 3), 250, np.uint8)


@pytest.fixture(scope="module")
def crowd(tmp_path_factory):
    """A prepared file with 150 images to train on, twelve held out."""
    path = tmp_path_factory.mktemp("crowd") / "crowd.h5"
    random = np.random.default_rng(0)
    with open_for_writing(path) as file:
        for number in range(162):
            split = "train" if number < 150 else "val"
            points = random.uniform(0, 60, (number % 12, 2)).astype(np.float32)
            encoded = cv2.imencode(".png", noise(number))[1]
            write_sample(file, StoredSample(str(number), split, encoded, points, 128, 64, len(points)))
    return path


@pytest.fixture(scope="module")
def checkpoint(counter, crowd, tmp_path_factory):
    """Calibrated by the command."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    zoo.save(counter.network, zoo.Spec("audiocsrnet-s", both_kinds(), TINY), path)
    assert command.run(app, ["calibrate", str(path), "--data", str(crowd), "--runtime", "eager"]) == 0
    return path


@pytest.fixture
def calibrated(checkpoint) -> CrowdCounter:
    tool = load(checkpoint, runtime="eager")
    tool.predictor.intervals = Intervals(0.9, WIDTHS, WIDTHS, 20)
    return tool


@pytest.fixture
def files(tmp_path):
    paths = tmp_path / "noise.png", tmp_path / "flat.png"
    for path, image in zip(paths, (noise(200), FLAT), strict=True):
        cv2.imwrite(str(path), image)
    return [str(path) for path in paths]


def test_calibrate_writes_statistics(checkpoint, calibrated):
    made = Familiarity.from_dict(zoo.read_spec(checkpoint).meta["familiarity"])
    assert made is not None
    assert made.samples == 150
    assert len(made.mean) == 64
    assert np.mean([calibrated.count(noise(seed), exit="V1").familiar for seed in range(300, 330)]) > 0.8
    assert calibrated.count(FLAT, exit="V1").familiar is False


def test_too_few_images_leave_what_is_there(checkpoint, crowd, caplog, tmp_path):
    few = tmp_path / "few.h5"
    with open_for_writing(few) as file:
        for split in ("train", "val"):
            for number in range(12):
                encoded = cv2.imencode(".png", noise(number))[1]
                write_sample(file, StoredSample(str(number), split, encoded, np.zeros((1, 2), np.float32), 128, 64, 1))
    before = zoo.read_spec(checkpoint).meta["familiarity"]
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(checkpoint.read_bytes())
    assert command.run(app, ["calibrate", str(copy), "--data", str(few), "--runtime", "eager"]) == 0
    assert "12 images are too few for statistics of 64 numbers; at least 128 are needed" in caplog.text
    assert zoo.read_spec(copy).meta["familiarity"] == before


def test_every_output_has_it(calibrated, files, tmp_path, capsys):
    count_inputs(calibrated, files, CountOptions(format="json"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["familiar"] for row in rows] == [True, False]
    for format, expected in (("csv", ["true", "false"]), ("parquet", [True, False])):
        out = tmp_path / f"rows.{format}"
        count_inputs(calibrated, files, CountOptions(format=format, out=out))
        read = list(csv.DictReader(out.open())) if format == "csv" else pq.read_table(out).to_pylist()
        assert [row["familiar"] for row in read] == expected
    count_inputs(calibrated, files)
    _, familiar, other = capsys.readouterr().out.splitlines()
    assert not familiar.endswith("unfamiliar")
    assert other.endswith("unfamiliar")
    for file, report in zip(files, (False, True), strict=True):
        count_inputs(calibrated, [file])
        assert ("unlike those the network was trained on" in capsys.readouterr().out) is report


def test_without_statistics_it_is_not_known(counter, files, tmp_path, capsys):
    assert counter.count(FLAT).familiar is None
    count_inputs(counter, files, CountOptions(format="json"))
    assert [json.loads(line)["familiar"] for line in capsys.readouterr().out.splitlines()] == [None, None]
    count_inputs(counter, files, CountOptions(format="csv", out=tmp_path / "rows.csv"))
    assert [row["familiar"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["", ""]


def test_the_interval_is_wider(calibrated):
    for image, familiar in ((noise(200), True), (FLAT, False)):
        for result in calibrated.stream(image):
            assert result.familiar is familiar
            half = (0.25 if familiar else 2.0) * (result.count + 10)
            assert result.interval == pytest.approx((max(0, result.count - half), result.count + half))
    wide = Intervals(0.9, {"final": 5.0})
    assert wide.around("final", 10.0, has_audio=False, familiar=False) == (0.0, 110.0)
    assert Intervals().around("final", 10.0, has_audio=False, familiar=False) is None


def test_nobody_is_confident_of_what_is_not_familiar(calibrated):
    policy = Confident(uncertainty=1e-3, share=1.9)
    assert calibrated.count(noise(200), policy=policy).chosen.exit == "V1"
    assert calibrated.count(FLAT, policy=policy).chosen.exit == "final"


def test_every_way_to_count_agrees(calibrated):
    """One by one, in batches, prepared before, by a deadline; whatever else is in the batch."""
    shown = [noise(200), FLAT, noise(201), noise(202)]
    expected = [calibrated.count(image).familiar for image in shown]
    assert expected[:2] == [True, False]
    samples = [(image, None) for image in shown]
    assert [result.familiar for result in calibrated.count_many(samples)] == expected
    assert [result.familiar for result in calibrated.answers(calibrated.prepare(samples))] == expected
    assert [calibrated.count(image, deadline_ms=6e4).familiar for image in shown] == expected


def test_tiles_are_one_image(calibrated, monkeypatch):
    """Cut into several and seen one after the other, their sums are those of all of it."""
    large = cv2.resize(noise(200), (1280, 320), interpolation=cv2.INTER_CUBIC)
    seen = []
    is_familiar = Familiarity.is_familiar
    monkeypatch.setattr(Familiarity, "is_familiar", lambda self, sums: seen.append(sums) or is_familiar(self, sums))
    calibrated.count(large)
    expected = calibrated.predictor.feature_sums(large)
    assert expected is not None
    assert expected[-1] > 2 * 128
    assert seen[-1] == pytest.approx(expected, rel=1e-4)
    monkeypatch.setattr("crowdexit.inference.collate.PIXELS_IN_FLIGHT", 2 * 128 * 64)
    calibrated.count(large)
    assert seen[-1] == pytest.approx(expected, rel=1e-4)


def test_padding_does_not_matter(calibrated):
    """An image that fills half of the canvas has the features of that half."""
    chain = calibrated.chain
    image = torch.randn(1, 3, 64, 128)
    valid_mask = torch.zeros(1, 1, 8, 16)
    valid_mask[..., :8] = 1
    state = chain.advance(0, chain.begin(inputs(image, valid_mask=valid_mask)))
    visual, _ = chain.visual_of(state)
    (sums,) = chain.feature_sums(state)
    kept = visual[0, :, :, :8].flatten(1).double()
    assert sums == pytest.approx(np.concatenate([kept.sum(1), kept.square().sum(1), [64]]), rel=1e-4)


@pytest.mark.parametrize("name", ["compile", "openvino", "onnx"])
def test_runtimes_agree(counter, name):
    if name != "compile":
        pytest.importorskip({"openvino": "openvino", "onnx": "onnxruntime"}[name])
    batch = inputs(torch.randn(2, 3, 64, 128), valid_mask=torch.rand(2, 1, 8, 16))
    plain, other = (
        chain.feature_sums(chain.advance(0, chain.begin(batch)))
        for chain in (Eager().ready(counter.network), select_runtime(name).ready(counter.network))
    )
    assert other == pytest.approx(plain, rel=1e-3, abs=1e-3)


def test_an_export_has_the_statistics(checkpoint, tmp_path):
    pytest.importorskip("openvino")
    out = tmp_path / "export"
    assert command.run(app, ["export", "--model", str(checkpoint), "--out", str(out), "--exits", "V1"]) == 0
    exported = load(out)
    assert [exported.count(image).familiar for image in (noise(200), FLAT)] == [True, False]


def test_another_size_has_none(checkpoint, tmp_path):
    """Features of people of another size are not the same."""
    network, spec = zoo.load(checkpoint)
    network, spec = zoo.with_exits(network, spec, [])
    assert "familiarity" not in zoo.at_size(network, spec, (256, 128))[1].meta


def test_tokens_have_none():
    network = zoo.build(zoo.Spec("transcrowd-token-s", (), {"size": [64, 64], "dim": 12, "depth": 1, "heads": 2}))
    assert CrowdCounter(network.eval(), "tokens", runtime=Eager()).predictor.feature_sums(noise(0)) is None


def test_statistics_of_another_network_are_refused(calibrated):
    assert calibrated.familiarity is not None
    short = replace(calibrated.familiarity, mean=np.zeros(4, np.float32), precision=np.eye(4, dtype=np.float32))
    tool = CrowdCounter(calibrated.network, "tiny", runtime=Eager(), familiarity=short)
    with pytest.raises(FamiliarityError, match="statistics of 4 numbers do not fit 64 features"):
        tool.count(FLAT)
