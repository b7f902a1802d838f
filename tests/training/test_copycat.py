"""Copycat: unlabelled images among the real ones, and the backbone's own answers for their truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from audio_files import tone, write_wav
from tiny_runs import best, run, tiny
from torch.utils.data import default_collate
from typer.testing import CliRunner

from crowdexit.cli.main import app
from crowdexit.data.classes import write_classes
from crowdexit.data.dataset import EpochPlan, MixedPlan
from crowdexit.data.log_mel import read_audio
from crowdexit.data.spectrogram import Spectrogram
from crowdexit.data.store import Store, open_for_writing, write_sample
from crowdexit.data.unlabelled import ImageFolder
from crowdexit.data.views import normalise
from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.models.backbones.convnets import ConvNetConfig
from crowdexit.models.network import FINAL
from crowdexit.training.branches import load_teacher, taught
from crowdexit.training.copycat import copycat_recipe
from crowdexit.training.data import ClassData, make_data
from crowdexit.training.modules import record
from crowdexit.training.recipe import Recipe

EXITS = [{"name": "V1", "place": "V1", "kind": "slvit"}, {"name": "AV2", "place": "AV2", "kind": "cnn"}]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(5)
    (folder / "deeper").mkdir()
    for number in range(5):
        image = cv2.GaussianBlur(rng.integers(0, 256, (80, 100 + 10 * number, 3), np.uint8), (9, 9), 3)
        cv2.imwrite(str(folder / ("deeper" if number % 2 else ".") / f"{number}.jpg"), image)
    (folder / "notes.txt").write_text("nothing to see")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    return folder


@pytest.fixture(scope="module")
def branches(store, backbone, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("branches")
    run(tiny(store, "branches", start=backbone, exits=EXITS, epochs=1, local=1.0), out)
    return out / "model.safetensors"


def mixed(store, branches, images, **keys):
    recipe = copycat_recipe(branches, store, images, **keys)
    network, _ = zoo.load(branches)
    return recipe, network, make_data(recipe, network)


def test_a_folder_is_read_to_the_bottom_and_says_what_it_left_out(images):
    folder = ImageFolder(images)
    assert folder.ids("") == sorted(folder.ids(""))
    assert {Path(id).name for id in folder.ids("")} == {f"{n}.jpg" for n in range(5)}
    assert folder.skipped == 1
    height, width = folder.image("", 0).shape[:2]
    assert height == width == 80


def test_recordings_become_spectrograms_like_those_of_the_set(tmp_path):
    for number in range(3):
        write_wav(tmp_path / "sounds" / "deeper" / f"{number}.wav", tone(500 * (number + 1), 22_050), 22_050)
    (tmp_path / "sounds" / "broken.wav").write_bytes(b"RIFF")
    write_wav(tmp_path / "sounds" / "empty.wav", [])
    spectrogram = Spectrogram("stft", 32, 0.5)
    rng = np.random.default_rng(0)
    with write_classes(tmp_path / "set.h5", ["a", "b"], "tones", spectrogram=spectrogram) as writer:
        for split in ("train", "val"):
            writer.add(split, rng.integers(0, 256, (8, 32, 32, 3), np.uint8), [0, 1] * 4, [str(n) for n in range(8)])
    recipe = Recipe.model_validate(
        {
            "stage": "branches",
            "model": "resnet18",
            "changes": {"size": [32, 32], "outputs": 2},
            "loss": "cross-entropy",
            "data": {"store": tmp_path / "set.h5"},
            "exits": [{"name": "1", "place": "1", "kind": "cnn"}],
            "copycat": {"pictures": tmp_path / "sounds", "ratio": 2.0},
        }
    )
    data = ClassData(recipe, ConvNetConfig("resnet18", size=(32, 32), outputs=2))
    assert data.note == "3 unlabelled recordings; 2 unusable files skipped"
    assert data.unlabelled is not None
    assert data.unlabelled.ids == ["deeper/0.wav", "deeper/1.wav", "deeper/2.wav"]
    expected = spectrogram.of(*read_audio(tmp_path / "sounds" / "deeper" / "1.wav"))
    assert torch.equal(data.unlabelled[1, 7]["image"], torch.from_numpy(normalise(expected)))  # never mirrored
    assert torch.equal(data.train_set[0, 7]["image"], data.train_set[0, 0]["image"])


def test_their_truth_is_what_the_backbone_says(store, branches, images):
    _, network, data = mixed(store, branches, images)
    batch = next(iter(data.train_dataloader()))
    report = batch["unlabelled"].clone()
    assert 0 < report.sum() < len(report)
    before = {key: batch[key].clone() for key in ("count", "density")}
    with torch.no_grad():
        expected = network(record({key: batch[key] for key in ("image", "valid_mask", "log_mel", "has_audio")}))[FINAL]
    after = taught(network, batch)
    torch.testing.assert_close(after["count"][report], expected.value[report].clamp(min=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after["density"][report], expected.density[report], rtol=1e-4, atol=1e-5)
    for key, value in before.items():
        assert torch.equal(after[key][~report], value[~report])
    assert not batch["has_audio"][report].any()


@pytest.mark.parametrize(("ratio", "unlabelled"), [(2.0, 20), (0.5, 5)])
def test_the_ratio_is_fake_to_real(store, branches, images, ratio, unlabelled):
    _, _, data = mixed(store, branches, images, ratio=ratio)
    report = torch.cat([batch["unlabelled"] for batch in data.train_dataloader()])
    assert (int((~report).sum()), int(report.sum())) == (10, unlabelled)


@pytest.mark.parametrize("teacher", [None, "another"])
def test_the_teacher_labels(store, backbone, branches, images, tmp_path, monkeypatch, teacher):
    """The labels are its final exit's outputs; by default the run's own backbone is the teacher."""
    network, spec = zoo.load(backbone)
    with torch.no_grad():
        network.final.conv.weight.mul_(3.0)
    zoo.save(network, spec, tmp_path / "another" / "model.safetensors")
    path = None if teacher is None else tmp_path / teacher
    expected, _ = zoo.load(backbone if path is None else path)
    labelled = 0

    def taught_and_seen(network, batch):
        nonlocal labelled
        report = batch["unlabelled"].clone()
        after = taught(network, batch)
        features = record({key: batch[key] for key in ("image", "valid_mask", "log_mel", "has_audio")})
        wanted = expected(features, [FINAL])[FINAL].value.clamp(min=0)
        torch.testing.assert_close(after["count"][report], wanted[report], rtol=1e-4, atol=1e-4)
        labelled += int(report.sum())
        return after

    monkeypatch.setattr("crowdexit.training.branches.taught", taught_and_seen)
    run(copycat_recipe(branches, store, images, teacher=path, epochs=1), tmp_path / "cc")
    assert labelled == 20
    assert best(tmp_path / "cc").keys() == best(branches.parent).keys()
    report = zoo.read_spec(tmp_path / "cc" / "model.safetensors").meta["recipe"]["copycat"]
    assert report["teacher"] == teacher


def test_a_teacher_of_other_images_or_classes(store, backbone, branches, images, tmp_path):
    def teach(spec: zoo.Spec) -> None:
        zoo.save(zoo.build(spec), spec, tmp_path / "teacher.safetensors")
        recipe = copycat_recipe(branches, store, images, teacher=tmp_path / "teacher.safetensors", epochs=1)
        run(recipe, tmp_path / "cc")

    own = zoo.read_spec(backbone)
    with pytest.raises(CrowdExitError, match="takes images of 64x64, the run's are 128x64"):
        teach(zoo.Spec(own.model, (), {**own.changes, "size": [64, 64]}))
    small = zoo.Spec("resnet18", (), {"size": [128, 64], "outputs": 2}, {"classes": ["a", "b"]})
    with pytest.raises(CrowdExitError, match="sorts into classes, the run counts"):
        teach(small)
    with pytest.raises(CrowdExitError, match="neither a model's name"):
        run(copycat_recipe(branches, store, images, teacher=tmp_path / "nowhere", epochs=1), tmp_path / "cc")
    zoo.save(zoo.build(small), small, tmp_path / "a_b.safetensors")
    other = replace(small, meta={"classes": ["b", "a"]})
    with pytest.raises(CrowdExitError, match="not trained on the same classes"):
        load_teacher(tmp_path / "a_b.safetensors", zoo.build(other), other)


@pytest.mark.parametrize("ratio", [0.5, 2.0, 3.0])
def test_each_batch_has_its_share(ratio):
    plan = EpochPlan([str(i) for i in range(12)], length=24)
    others = EpochPlan([str(i) for i in range(5)], length=round(24 * ratio))
    keys = list(MixedPlan(plan, others, 12))
    assert len(keys) == len(plan) + len(others)
    assert sorted(k for k in keys if k[0] < 12) == sorted(plan.plan())
    size = 6
    for start in range(0, len(keys) - size + 1, size):
        unlabelled = sum(index >= 12 for index, _ in keys[start : start + size])
        assert abs(unlabelled - size * ratio / (1 + ratio)) <= 1


def test_fine_tuning_moves_the_branches_and_nothing_else(store, branches, images, tmp_path):
    arguments = ["copycat", str(branches), "--data", str(store), "--pictures", str(images), "--epochs", "2"]
    result = CliRunner().invoke(app, [*arguments, "--lr", "0.01", "--out", str(tmp_path / "cc")])
    assert result.exit_code == 0, result.output
    before, after = best(branches.parent), best(tmp_path / "cc")
    assert set(before) == set(after)
    for key, value in before.items():
        moved = not torch.equal(value, after[key])
        assert moved == key.startswith("branches."), key
    report = zoo.read_spec(tmp_path / "cc" / "model.safetensors").meta["recipe"]
    assert report["copycat"] == {"pictures": images.name, "split": "train", "ratio": 2.0, "teacher": None}
    assert [e["name"] for e in report["exits"]] == ["V1", "AV2"]


def test_labels_of_a_prepared_file_are_not_read(store, branches, tmp_path):
    lies = tmp_path / "lies.h5"
    with Store(store) as true, open_for_writing(lies) as file:
        for id in true.ids("train"):
            sample = true.read("train", id)
            write_sample(file, replace(sample, count=1e6, points=np.zeros((0, 2), np.float32)))
    _, network, data = mixed(store, branches, lies)
    assert data.unlabelled is not None
    batch = default_collate([{**data.unlabelled[i, 0], "unlabelled": torch.tensor(True)} for i in range(3)])
    assert taught(network, batch)["count"].max() < 1e5


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"ratio": 0.0}, "copycat.ratio"), ({"ratio": float("inf")}, "copycat.ratio"), ({"lr": -1.0}, "optimiser.lr")],
)
def test_values_that_mean_nothing(store, branches, images, keys, message):
    with pytest.raises(CrowdExitError, match=message):
        copycat_recipe(branches, store, images, **keys)


def test_what_cannot_be_copied(store, backbone, branches, images, tmp_path):
    with pytest.raises(CrowdExitError, match="not trained classifier-wise"):
        copycat_recipe(backbone, store, images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CrowdExitError, match="no image of use"):
        mixed(store, branches, tmp_path / "empty")
    with pytest.raises(CrowdExitError, match="no such prepared file"):
        mixed(store, branches, tmp_path / "nowhere")
