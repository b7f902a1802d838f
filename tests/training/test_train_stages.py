"""Every stage runs from a recipe to a checkpoint that loads; what cannot be trained says so in one line."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, best, run, same, tiny, write_store

import crowdexit.training.run as runs
from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.models.stages import inputs
from crowdexit.training.data import make_data
from crowdexit.training.losses import density_loss
from crowdexit.training.modules import TrainingError, record, validated
from crowdexit.training.recipe import Recipe
from crowdexit.training.run import make_experiment, starting_network, train

VIT = {"model": "transcrowd-token-s", "changes": {"size": [64, 64], "dim": 12, "depth": 4, "heads": 2, "hidden": 8}}
WHOLE_L2 = {"loss": "l2", "data": {"stride": 1, "whole": True, "draws": 12, "balance": {"A_*": 0.5, "B_*": 0.5}}}


@pytest.mark.parametrize(
    ("stage", "keys"),
    [
        ("hearing", {"data": {"canvas": [64, 64]}, "ema": 0.5}),
        ("density", {"ema": 0.5, "data": {"canvas": [64, 64], "conditions": {"share": 1}}, "precision": "bf16-mixed"}),
        ("density", WHOLE_L2),
        ("branches", {"precision": "bf16-mixed", "loss": "balanced"}),
    ],
    ids=["hearing", "balanced", "l2", "branches"],
)
def test_stage(store, backbone, tmp_path, stage, keys):
    start = {"start": backbone} if stage == "branches" else {}
    recipe = tiny(store, stage, epochs=2, **start, **keys)
    run(recipe, tmp_path)
    network, spec = zoo.load(tmp_path)
    assert network.config.size == (128, 64)
    assert spec.meta["recipe"]["stage"] == stage
    assert spec.meta["validation"]
    assert not list(tmp_path.glob("*.part"))


def test_the_right_weights_learn(store, tmp_path):
    begin = zoo.build(zoo.Spec("audiocsrnet-s", changes=TINY))
    save = tmp_path / "begin.safetensors"
    zoo.save(begin, zoo.Spec("audiocsrnet-s", changes=TINY), save)
    start = {k: v.clone() for k, v in begin.state_dict().items()}

    run(tiny(store, "hearing", epochs=1, start=save, data={"canvas": [64, 64]}), tmp_path / "hearing")
    moved = {k for k, v in best(tmp_path / "hearing").items() if not torch.equal(v, start[k])}
    assert moved == {k for k in start if k.startswith("stages.1.layers.")}

    run(tiny(store, "density", epochs=1, start=save), tmp_path / "density")
    moved = {k for k, v in best(tmp_path / "density").items() if not torch.equal(v, start[k])}
    assert moved == set(start)


def test_stage_two_starts_as_the_sum_and_learns_it(store, backbone, tmp_path):
    changes = {**TINY, "regressor": True}
    begun, _ = zoo.load(backbone)
    run(tiny(store, "count", epochs=1, start=backbone, changes=changes, data={"whole": True}, loss="mae"), tmp_path)
    network, _ = zoo.load(tmp_path)
    weight = network.final.regressor.weight.detach()
    assert not torch.equal(weight, torch.ones_like(weight))
    assert float((weight - 1).abs().max()) < 0.05, "it began at one"
    assert not torch.equal(network.final.conv.weight, begun.final.conv.weight), "the whole network goes on"
    with pytest.raises(TrainingError, match="stage two needs the regressor"):
        run(tiny(store, "count", start=backbone, loss="mae"), tmp_path / "no")


def test_images_with_only_a_density_map(tmp_path):
    path = write_store(tmp_path / "density.h5", only_density=True)
    run(tiny(path, "density", epochs=1, **WHOLE_L2), tmp_path / "whole")
    assert zoo.load(tmp_path / "whole")
    with pytest.raises(TrainingError, match="train/A_0 has only a density map and cannot be cropped") as error:
        run(tiny(path, "density"), tmp_path / "crops")
    assert "\n" not in str(error.value)


def test_published_weights_are_the_start(store, tmp_path):
    changes = {**TINY, "front_norm": False}
    donor = zoo.build(zoo.Spec("audiocsrnet-s", changes=changes))
    layers = {f"features.{k}": v for k, v in donor.stages[0].layers.state_dict().items()}
    save_file(layers, tmp_path / "vgg.safetensors")
    recipe = tiny(
        store,
        "density",
        epochs=1,
        changes=changes,
        weights={"vgg16": str(tmp_path / "vgg.safetensors")},
        optimiser={"lr": 1e-9},
    )
    weights = run(recipe, tmp_path / "out")
    for key, tensor in donor.stages[0].layers.state_dict().items():
        torch.testing.assert_close(weights[f"network.stages.0.layers.{key}"], tensor, atol=1e-6, rtol=0)
    torch.manual_seed(recipe.seed)
    assert not same(dict(donor.state_dict()), dict(zoo.build(zoo.Spec("audiocsrnet-s", changes=changes)).state_dict()))


def test_stops_early(store, tmp_path):
    run(
        tiny(store, "density", epochs=8, stop=1, optimiser={"lr": 0.1}, changes={**TINY, "density_scale": 1.0}),
        tmp_path,
    )
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["epoch"] == state["crowdexit_best"][1] + 1 < 7


@pytest.mark.parametrize(("watch", "condition"), [("audio", "sound"), ("no-audio", "silent")])
def test_the_condition_that_is_watched(store, tmp_path, watch, condition):
    recipe = tiny(store, "density", epochs=1, watch=watch)
    run(recipe, tmp_path)
    report = zoo.read_spec(tmp_path / "model.safetensors").meta
    errors = {name: report["validation"][name]["error"] for name in ("silent", "sound")}
    assert errors["silent"] != errors["sound"]
    assert report["error"] == errors[condition]


def test_branches_are_validated_in_the_condition_that_is_watched(store, backbone, tmp_path):
    """Four of the five validation samples have audio; AV1's output depends on it."""
    recipe = tiny(store, "branches", start=backbone)
    network, _ = starting_network(recipe)
    data = make_data(recipe, network)
    make_experiment(network, zoo.Spec("audiocsrnet-s"), recipe, tmp_path, 10.0)
    network.eval()
    exits = {name: network.exit_module(name) for name in ("V1", "AV1")}
    said: dict[str, list[tuple[str, str, float, float]]] = {"audio": [], "no-audio": [], "mean": []}
    with torch.no_grad():
        for batch in data.val_dataloader():
            for watch, rows in said.items():
                for name, *parts in validated(network, batch, exits, network.stage_of, watch):
                    rows += [(name, id, float(v), float(t)) for id, v, t in zip(*parts, strict=True)]
    answers = {}
    with torch.no_grad():
        for batch in data.val_dataloader():
            has_audio = record(batch)
            for watch, features in (
                ("audio", has_audio),
                ("no-audio", replace(has_audio, has_audio=torch.zeros_like(has_audio.has_audio))),
            ):
                for name, answer in network(features, list(exits)).items():
                    for id, value, true in zip(batch["id"], answer.value, batch["count"], strict=True):
                        answers[watch, name, id] = (float(value), float(true))
    ids = {"audio": [id for id in data.val_set.ids if not id.endswith("_4")], "no-audio": data.val_set.ids}
    for watch, wanted in ids.items():
        assert sorted(row[:2] for row in said[watch]) == sorted((name, id) for name in exits for id in wanted)
        for name, id, *pair in said[watch]:
            assert pair == pytest.approx(answers[watch, name, id], rel=1e-4)
    assert all(answers["audio", "AV1", id] != answers["no-audio", "AV1", id] for id in ids["audio"])
    assert len(said["mean"]) == 2 * 2 * 5  # every sample in both ways


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage": "count", **VIT, "watch": "audio"}, "watch: audio does not reach the final exit of transcrowd"),
        ({"stage": "density", "data": {"val_ids": "*_4"}, "watch": "audio"}, "no sample of val has audio"),
    ],
)
def test_audio_that_is_not_there_to_watch(store, tmp_path, keys, message):
    with pytest.raises(CrowdExitError, match=message):
        run(tiny(store, **keys), tmp_path)


def test_what_is_written_and_said(store, tmp_path):
    text = io.StringIO()
    train(tiny(store, "density", epochs=2), tmp_path, accelerator="cpu", console=Console(file=text, width=40))
    lines = text.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1/2"], ["epoch", "2/2"]], "one line an epoch"
    assert "without audio: A " in lines[0]
    assert lines[1].endswith("0:00:00 left")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    assert "val/error" in tags
    assert "val/silent/mae/A" in tags
    assert "val/sound/error" in tags


def test_lightning_is_silent(store, tmp_path, capfd):
    train(tiny(store, "density", epochs=1), tmp_path, accelerator="cpu", console=Console(file=io.StringIO()))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"stage": "branches"}, "classifier-wise training needs a trained backbone: set start"),
        ({"start": "nowhere"}, "nowhere: neither a model's name"),
        ({"data": {"train_ids": "C_*"}}, "no sample in 'train' matches 'C_\\*'"),
        ({"data": {"balance": {"C_*": 1}}}, "no training sample matches 'C_\\*'"),
        ({"data": {"store": "nowhere.h5"}}, "nowhere.h5: no such prepared file"),
        ({"data": {"store": None}}, "no data: name a prepared file with --data"),
        ({"optimiser": {"lr": 1e9, "clip": None}}, "epoch 1: the network diverged; try a lower optimiser.lr"),
        ({"data": {"canvas": [64, 64]}, "stage": "count"}, "needs the model's native size"),
    ],
)
def test_bad_input_is_one_line(store, tmp_path, keys, problem):
    keys = dict(keys)
    with pytest.raises(CrowdExitError, match=problem) as error:
        run(tiny(store, keys.pop("stage", "density"), **keys), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_damage_found_while_training_is_one_line(store, tmp_path):
    import h5py

    broken = tmp_path / "broken.h5"
    broken.write_bytes(store.read_bytes())
    with h5py.File(broken, "a") as file:
        file["train/A_0/image"][:] = 0
    with pytest.raises(CrowdExitError, match="train/A_0 is damaged") as error:
        run(tiny(broken, "density"), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_what_is_frozen_stays_to_the_bit(store, backbone, tmp_path):
    recipe = tiny(store, "density", epochs=2, start=backbone, frozen=["stages.0", "stages.1.layers"], ema=0.5)
    run(recipe, tmp_path / "out")
    before, after = best(backbone.parent), best(tmp_path / "out")
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert not {k for k in moved if k.startswith(("stages.0.", "stages.1.layers."))}
    assert {k for k in before if k.startswith(("stages.2.", "stages.3.", "final."))} <= moved
    with pytest.raises(TrainingError, match=r"frozen: the network has no 'stages\.9'"):
        run(tiny(store, "density", start=backbone, frozen=["stages.9"]), tmp_path / "no")


def test_learning_audio_leaves_outputs_without_audio_unchanged(store, backbone, tmp_path):
    frozen = ["stages.0", "*.conv", "*.norm", "*.fuse.linear.bias", "final"]
    recipe = tiny(store, "density", epochs=2, start=backbone, frozen=frozen, ema=0.5, data={"hear": 1.0})
    run(recipe, tmp_path / "out")
    before, after = best(backbone.parent), best(tmp_path / "out")
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    learned = ("stages.1.", "stages.2.blocks.0.fuse.linear.weight", "stages.3.blocks.4.fuse.linear.weight")
    assert all(any(key.startswith(part) for key in moved) for part in learned)
    assert not {key for key in moved if key.endswith("fuse.linear.bias") or ".conv." in key or ".norm." in key}
    image, log_mel = torch.rand(2, 3, 64, 128), torch.randn(2, 1, 96, 64)
    of = {}
    for name, path in (("before", backbone.parent), ("after", tmp_path / "out")):
        network = zoo.load(path)[0].eval()
        with torch.inference_mode():
            of[name] = [network(inputs(image, mel))["final"].density for mel in (None, log_mel)]
    assert torch.equal(of["before"][0], of["after"][0])
    assert not torch.equal(of["before"][1], of["after"][1])


def test_validation_images_are_degraded_as_configured(store, backbone, tmp_path):
    tables = []
    for brightness in (1.0, 0.05):
        recipe = tiny(store, "density", start=backbone, epochs=1, data={"val_conditions": {"brightness": brightness}})
        run(recipe, tmp_path / f"{brightness}")
        tables.append(zoo.read_spec(tmp_path / f"{brightness}" / "model.safetensors").meta["validation"]["silent"])
    assert tables[0] != tables[1]


def test_of_the_dark_only_the_count_is_asked():
    random = torch.Generator().manual_seed(0)
    density = torch.rand(3, 1, 4, 6, generator=random)
    count = density.sum((1, 2, 3))
    batch = {
        "density": torch.rand(3, 1, 4, 6, generator=random),
        "count": torch.tensor([300.0, 5.0, 50.0]),
        "dark": torch.tensor([True, False, True]),
    }
    recipe = Recipe.model_validate({"stage": "density", "model": "audiocsrnet-s", "even": 0.5, "map": 0.2})
    guess = recipe.model_copy(update={"guess": True})
    errors = (count - batch["count"]).abs()
    squared = 1e4 * (density - batch["density"]).square().mean((1, 2, 3)) / (1 + batch["count"] / 20) ** 0.5 / 6**0.5
    evened = errors / (batch["count"] + 10) ** 0.5 / 110**0.5
    torch.testing.assert_close(
        density_loss(density, count, batch, recipe), 0.2 * squared.mean() + evened.mean(), rtol=1e-5, atol=1e-5
    )
    wanted = 0.2 * squared[1] / 3 + (errors[0] / 110 + evened[1] + errors[2] / 110) / 3
    torch.testing.assert_close(density_loss(density, count, batch, guess), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("ability", "expected"), [(True, "bf16-mixed"), (False, "32-true")])
def test_bfloat16_only_where_the_processor_has_it(store, tmp_path, monkeypatch, ability, expected):
    used, trainer = [], runs.L.Trainer
    monkeypatch.setattr(runs, "has_bfloat16", lambda: ability)
    monkeypatch.setattr(runs.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(runs.L, "Trainer", lambda **settings: used.append(settings["precision"]) or trainer(**settings))
    run(tiny(store, "hearing", epochs=1, precision="auto", data={"canvas": [64, 64]}), tmp_path)
    assert used == [expected]
