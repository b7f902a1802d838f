"""Intervals and expected errors from a prepared file into a checkpoint, and what the command line makes of them."""

from __future__ import annotations

import json
import math

import cv2
import numpy as np
import pytest
import torch
from branches import both_kinds
from tiny import TINY

from crowdexit.calibration.intervals import IntervalError, Intervals, expected_error
from crowdexit.cli.main import app
from crowdexit.data.store import Store, StoredSample, open_for_writing, write_sample
from crowdexit.evaluation.evaluate import calibrate, evaluate
from crowdexit.export.manifest import read_manifest
from crowdexit.export.writer import export
from crowdexit.inference.counter import load
from crowdexit.models import zoo
from crowdexit.utils import command


@pytest.fixture
def prepared(tmp_path):
    """Twelve noisy images, every third with audio."""
    random = np.random.default_rng(0)
    path = tmp_path / "crowd.h5"
    with open_for_writing(path) as file:
        for number in range(12):
            points = random.uniform(0, 60, (5 * number, 2)).astype(np.float32)
            image = cv2.imencode(".png", random.integers(0, 255, (64, 128, 3), np.uint8))[1]
            audio = {"log_mel": random.normal(size=(96, 64)).astype(np.float32), "audio_source": "simulated"}
            sample = StoredSample(
                str(number), "val", image, points, 128, 64, len(points), **({} if number % 3 else audio)
            )
            write_sample(file, sample)
    return path


@pytest.fixture
def checkpoint(counter, tmp_path):
    path = tmp_path / "model.safetensors"
    zoo.save(counter.network, zoo.Spec("audiocsrnet-s", both_kinds(), TINY), path)
    return path


def test_calibrate(prepared, checkpoint, capsys):
    arguments = [str(checkpoint), "--data", str(prepared), "--level", "0.7", "--runtime", "eager"]
    assert command.run(app, ["calibrate", *arguments]) == 0
    assert "within ± w" in capsys.readouterr().out
    made = Intervals.from_dict(zoo.read_spec(checkpoint).meta["intervals"])
    exits = load(checkpoint, runtime="eager").network.exit_names
    for table in (made.without_audio, made.with_audio, made.without_audio_errors, made.with_audio_errors):
        assert list(table) == exits
    for name in exits:
        # The mean of the scores, and a quantile of them that is above most.
        assert 0 < made.without_audio_errors[name] < made.without_audio[name]
    assert (made.samples, made.with_audio_samples) == (12, 4)
    assert made.errors(has_audio=True) == made.with_audio_errors
    assert made.errors(has_audio=False) == made.without_audio_errors
    assert made.errors(has_audio=True) != made.errors(has_audio=False)


def test_an_export_has_intervals_of_its_own(prepared, checkpoint, image_file, tmp_path, capsys):
    """At another size the checkpoint's do not hold: said, and measured on the export itself."""
    out = tmp_path / "small"
    widths = {"V1": 0.4, "final": 0.1}
    zoo.annotate(checkpoint, intervals=Intervals(0.9, widths, widths, 20).to_dict())
    made = ["export", "--model", str(checkpoint), "--out", str(out), "--exits", "final", "--size", "64x64"]
    assert command.run(app, made) == 0
    assert f"it has no intervals at 64x64; `crowdexit calibrate {out}" in capsys.readouterr().err
    seen = ["count", str(image_file()), "--model", str(out), "--format", "json"]
    confident = [*seen, "--policy", "confident"]
    assert command.run(app, confident) == 2
    assert "no intervals to decide confidence with; run `crowdexit calibrate`" in capsys.readouterr().err
    files = sorted(path.name for path in out.iterdir())
    assert command.run(app, ["calibrate", str(out), "--data", str(prepared), "--level", "0.7"]) == 0
    assert "within ± w" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == files
    kept = read_manifest(out).intervals
    assert list(kept["silent"]) == ["final"]
    assert kept["silent"] != {"final": 0.1}
    assert command.run(app, confident) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    low, high = row["exits"][-1]["interval"]
    half = kept["silent"]["final"] * (row["count"] + 10)
    assert (low, high) == pytest.approx((max(0, row["count"] - half), row["count"] + half), abs=0.05)


def test_too_few_samples_with_audio(prepared, checkpoint, caplog):
    """Twelve images are enough for 0.9, four with audio are not: told, and the rest is kept."""
    arguments = [str(checkpoint), "--data", str(prepared), "--level", "0.9", "--runtime", "eager"]
    assert command.run(app, ["calibrate", *arguments]) == 0
    assert "not calibrated with audio: 4 images are too few for a level of 0.9" in caplog.text
    made = Intervals.from_dict(zoo.read_spec(checkpoint).meta["intervals"])
    assert (made.samples, made.with_audio_samples) == (12, 0)
    assert made.with_audio == made.with_audio_errors == {}
    assert list(made.without_audio) == list(made.without_audio_errors)
    assert made.errors(has_audio=True) == made.without_audio_errors


def test_tiled_images_are_counted_without_audio(prepared, checkpoint, monkeypatch):
    """Their sound belongs to the whole scene: they tell nothing of what is heard, nor are they counted again for it."""
    wide = prepared.with_name("wide.h5")
    with Store(prepared) as store, open_for_writing(wide) as file:
        for id in store.ids("val"):
            write_sample(file, store.read("val", id))
        random = np.random.default_rng(1)
        image = cv2.imencode(".png", random.integers(0, 255, (256, 1024, 3), np.uint8))[1]
        points = np.zeros((3, 2), np.float32)
        audio = {"log_mel": random.normal(size=(96, 64)).astype(np.float32), "audio_source": "simulated"}
        write_sample(file, StoredSample("wide", "val", image, points, 1024, 256, 3, **audio))
    counter = load(checkpoint, runtime="eager")
    stream, counted = counter.stream, []
    monkeypatch.setattr(counter, "stream", lambda *given: counted.append(given) or stream(*given))
    with Store(wide) as store:
        made = calibrate(counter, store, "val", store.ids("val"), 0.7)
        assert (made.samples, made.with_audio_samples) == (13, 4)
        assert len(counted) == (13 + 1) + (4 + 1)
        assert evaluate(counter, store, "val", ["wide"])["audio"] == "none"


def test_expected_errors():
    assert expected_error([10.0, 0.0, -5.0], [30.0, 0.0, 2.0]) == pytest.approx((20 / 20 + 0 + 7 / 10) / 3)
    before = Intervals(0.9, {"V1": 0.4}, {}, 20).to_dict()
    del before["silent_errors"], before["heard_errors"]  # as checkpoints were calibrated once
    old = Intervals.from_dict(before)
    assert old.errors(has_audio=False) == old.errors(has_audio=True) == {"V1": 0.4}
    # A mean error is not to be held against another exit's width.
    widths, errors = {"V1": 0.4, "final": 0.3}, {"V1": 0.2, "final": 0.1}
    for without_audio, has_audio, without_audio_errors, with_audio_errors, expected in [
        (widths, {}, {"final": 0.1}, {}, widths),
        (widths, {"final": 0.2}, errors, {"final": 0.2}, errors),
        (widths, widths, errors, {"V1": 0.2}, widths),
        ({"V1": 0.4}, {}, {"final": 0.1}, {}, {}),
    ]:
        mixed = Intervals(0.9, without_audio, has_audio, 20, without_audio_errors, with_audio_errors)
        assert mixed.errors(has_audio=True) == expected
    with pytest.raises(IntervalError, match="damaged"):
        Intervals.from_dict({**before, "silent_errors": {"V1": "x"}})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--deadline-ms", "0"], "a deadline of 0 ms is not positive"),
        (["--deadline-ms", "-1"], "a deadline of -1 ms is not positive"),
        (["--deadline-ms", "nan"], "a deadline of nan ms is not positive"),
        (["--policy", "fits"], "needs a deadline"),
        (["--policy", "confident"], "has no intervals to decide confidence with"),
        (["--policy", "confident", "--within", "x"], "bad bound 'x'"),
        (["--within", "5"], "is for the policy confident, not for anytime"),
        (["--budget-ms", "0"], "a budget of 0 ms is not positive"),
        (["--budget-ms", "1e6"], "exit V1 is not calibrated"),
        (["--budget-ms", "1e6", "--exit", "V1"], "a budget chooses the exits itself"),
        (["--late", "never"], "never"),
        (["--late", "fail"], "nothing is late without --deadline-ms"),
    ],
)
def test_bad_input_is_one_line(checkpoint, image_file, tmp_path, monkeypatch, capsys, options, line):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("crowdexit.inference.collate.PIXELS_PER_BATCH", 1)
    assert (
        command.run(app, ["count", str(image_file()), "--model", str(checkpoint), "--runtime", "eager", *options]) == 2
    )
    err = capsys.readouterr().err
    assert line in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("option", ["--deadline-ms", "--budget-ms"])
def test_invalid_times_fail_before_loading_weights(option, image_file, monkeypatch, capsys):
    monkeypatch.setattr("crowdexit.inference.counter.load", lambda *_, **__: pytest.fail("loaded"))
    assert command.run(app, ["count", str(image_file()), option, "-1"]) == 2
    assert " of -1 ms " in capsys.readouterr().err


def test_count_from_the_command_line(prepared, checkpoint, image_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("crowdexit.inference.collate.PIXELS_PER_BATCH", 1)
    widths = {"V1": 0.4, "AV1": 0.3, "AV2": 0.2, "final": 0.1}
    zoo.annotate(checkpoint, intervals=Intervals(0.9, widths, widths, 20).to_dict())
    images = [str(image_file(f"{number}.jpg", seed=number)) for number in range(3)]

    def said(*options: str) -> list[dict]:
        arguments = ["count", *images, "--model", str(checkpoint), "--runtime", "eager", "--format", "json", *options]
        assert command.run(app, arguments) == 0
        return [json.loads(row) for row in capsys.readouterr().out.splitlines()]

    assert {row["chosen_exit"] for row in said("--policy", "confident", "--within", "100000")} == {"V1"}
    fitting = said("--policy", "fits", "--deadline-ms", "60000")
    assert [[e["exit"] for e in row["exits"]] for row in fitting] == [["final"]] * 3
    assert all(row["in_time"] for row in fitting)
    assert [row["in_time"] for row in said("--deadline-ms", "0.001")] == [False] * 3
    within = said("--budget-ms", "600000")
    assert [row["source"] for row in within] == images
    assert [row["count"] for row in within] == pytest.approx([row["count"] for row in said()], abs=0.02)


def test_how_many_truths_the_intervals_hold(prepared, checkpoint, capsys):
    """Of the images that calibrated them as many as the rank says: of each third three of four, for 0.6 · 5 = 3."""
    arguments = ["--data", str(prepared), "--split", "val", "--no-audio", "--runtime", "eager", "--format", "json"]

    def rows() -> dict:
        assert command.run(app, ["evaluate", "--model", str(checkpoint), *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    assert "level" not in (said := rows())
    assert all("covered" not in row for row in said["exits"])
    assert command.run(app, ["calibrate", str(checkpoint), *arguments[:2], "--level", "0.6", "--runtime", "eager"]) == 0
    capsys.readouterr()
    said = rows()
    assert said["level"] == pytest.approx(60)
    for row in said["exits"]:
        assert row["covered"] == pytest.approx(100 * 9 / 12)
    assert command.run(app, ["evaluate", "--model", str(checkpoint), *arguments[:-2]]) == 0
    assert "75.0" in capsys.readouterr().out


def test_ranges_for_int8(prepared, checkpoint, tmp_path, capsys):
    """Measured into the checkpoint; with them it runs in int8 and is exported without images, and counts the same."""
    before = zoo.read_tensors(checkpoint)
    arguments = ["calibrate-int8", str(checkpoint), "--data", str(prepared), "--split", "val"]
    assert command.run(app, arguments) == 0
    assert "the ranges of " in capsys.readouterr().out
    after = zoo.read_tensors(checkpoint)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    network, spec = zoo.load(checkpoint)
    assert network.activation_ranges
    fewer, _ = zoo.with_exits(network, spec, ["V1"])
    assert fewer.activation_ranges == network.activation_ranges
    image = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    expected = load(checkpoint, runtime="eager").count(image).count
    assert load(checkpoint, runtime="openvino-int8").count(image).count == pytest.approx(expected, rel=0.05)
    out = export(checkpoint, tmp_path / "int8", precision="int8", exits=[])
    assert load(out).count(image).count == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("ranges", "line"),
    [
        ({"stages.0.layers.0": [0, 1, 255, [0.0] * 99]}, "is of another network"),
        ({"stages.9": [0, 1, 255, []]}, "'stages.9' is of another network"),
        ({"final.conv": [1, 2, 255, [0.0]]}, "'final.conv' is damaged"),
        ({"final.conv": [0, math.inf, 255, [0.0]]}, "'final.conv' is damaged"),
        ({"final.conv": [0, 1, 255, [math.nan]]}, "'final.conv' is damaged"),
        ({"final.conv": 3}, "its activation ranges are damaged"),
        (["final.conv"], "its activation ranges are damaged"),
    ],
)
def test_damaged_ranges_are_one_line(ranges, line, checkpoint):
    zoo.annotate(checkpoint, **{zoo.RANGES: ranges})
    with pytest.raises(zoo.ZooError, match=line):
        zoo.load(checkpoint)
