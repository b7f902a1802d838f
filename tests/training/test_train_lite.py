"""audiocsrnet-lite: backbone and density exits together, what stays frozen, and what listening changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from audio_files import tone, write_wav
from tiny_runs import best, last, run, same, tiny
from torch import nn

from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.models.stages import inputs
from crowdexit.training.data import make_data
from crowdexit.training.joint import JointTraining
from crowdexit.training.losses import exit_loss
from crowdexit.training.modules import averaged
from crowdexit.training.norms import start_norms
from crowdexit.training.recipe import Recipe, read_recipe
from crowdexit.training.run import make_experiment, starting_network

CHANGES = {"fusion_channels": [8] * 6, "audio_features": 4, "density_widths": [4, 4], "size": [160, 96]}
GROUPS = read_recipe("audiocsrnet-lite").optimiser.groups


def lite(store: Path, **keys: Any) -> Recipe:
    """The bundled recipe's ways on small crops: two steps an epoch, two epochs."""
    bundled = read_recipe("audiocsrnet-lite").model_dump()
    names = ("exits", "lambdas", "detached", "loss", "norms", "freeze_depthwise", "ema", "ema_warmup")
    wide = ("wide_share", "aspect", "degradations", "negatives", "balance", "scale", "hear")
    data = {**{name: bundled["data"][name] for name in wide}, "canvas": [64, 64], "draws": 4, "val_ids": "?_[01]"}
    content = {
        **{name: bundled[name] for name in names},
        "changes": CHANGES,
        "detach_until": 2,
        "norm_batches": 2,
        "batch": 2,
        "epochs": 2,
        **keys,
        "data": {**data, **keys.get("data", {})},
        "optimiser": {"groups": GROUPS, **keys.get("optimiser", {})},
    }
    return tiny(store, "end-to-end", model="audiocsrnet-lite", **content)


def experiment(recipe: Recipe, out: Path) -> JointTraining:
    torch.manual_seed(0)
    network, spec = starting_network(recipe)
    made = make_experiment(network, spec, recipe, out, 10.0)
    assert isinstance(made, JointTraining)
    return made


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("lite")
    run(lite(store), out)
    return out


def test_what_a_run_trains(trained):
    """What the recipe freezes stays, running statistics too; everything else moves."""
    ends, network = last(trained), zoo.load(trained)[0]
    averages = {k.removeprefix("average.module."): v for k, v in ends.items() if k.startswith("average.module.")}
    assert averages.keys() == network.state_dict().keys(), "the checkpoint's names are the network's"
    run_keys = {k.removeprefix("network."): v for k, v in ends.items() if k.startswith("network.")}
    # The averages are behind what is still moving.
    moved = {k for k, v in averages.items() if v.is_floating_point() and not torch.equal(v, run_keys[k])}
    statistics = {k for k in averages if "running" in k}
    kernels = {f"{name}.weight" for name, m in network.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1}
    assert len(kernels) == 29
    assert not moved & statistics
    assert not moved & kernels
    assert not any(k.startswith(("stages.0.conv_stem", "stages.0.blocks.0", "stages.2.")) for k in moved)
    assert not any(".fuse." in k for k in moved)
    for key in ("stages.0.blocks.2.0.conv_pw.weight", "stages.0.blocks.2.0.bn1.weight", "stages.1.to_32.0.0.bn1.bias"):
        assert key in moved
    for key in ("stages.1.lateral_8.weight", "stages.1.norm.weight", "stages.3.blocks.0.norm.bias", "final.conv.bias"):
        assert key in moved
    assert {f"branches.{name}.conv.weight" for name in ("V0", "V1", "AV2")} <= moved


def test_killed_and_resumed_is_the_same(store, trained, tmp_path, break_off):
    break_off(1, 1, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(lite(store), tmp_path)
    assert not same(last(tmp_path), last(trained))
    assert same(run(lite(store), tmp_path, resume=True), last(trained))
    assert same(best(tmp_path), best(trained))


def test_hearing_stage_trains_only_the_projection(store, trained, tmp_path):
    recipe = tiny(
        store,
        "hearing",
        model="audiocsrnet-lite",
        changes={},
        start=trained / "model.safetensors",
        data={"canvas": [64, 64], "draws": 4},
        batch=2,
        epochs=1,
    )
    run(recipe, tmp_path)
    before, after = best(trained), best(tmp_path)
    moved = {k for k in before if k in after and not torch.equal(before[k], after[k])}
    assert moved == {f"stages.2.project.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}


def test_the_recipes_for_audio_follow_each_other(store, trained, tmp_path):
    """Each takes what the one before it leaves, with its own exits, conditions and learning rates."""
    for pitch in (150, 220, 310):
        write_wav(tmp_path / "voices" / f"{pitch}.wav", tone(pitch, seconds=0.3))
    start = trained / "model.safetensors"
    for name in ("audiocsrnet-lite-hearing", "audiocsrnet-lite-night"):
        small = {"data.canvas": [64, 64], "data.draws": 4, "data.workers": 0, "batch": 2, "epochs": 1}
        if name.endswith("night"):
            small |= {"data.voices": tmp_path / "voices"}
        run(read_recipe(name, {**small, "data.store": store, "start": start}), tmp_path / name)
        start = tmp_path / name / "model.safetensors"
    assert zoo.load(start)[0].exit_names == ["V0", "V1", "AV1", "AV2", "final"]
    first, last = best(tmp_path / "audiocsrnet-lite-hearing"), best(tmp_path / "audiocsrnet-lite-night")
    for key in ("stages.2.project.0.weight", "stages.3.blocks.0.fuse.linear.weight", "stages.4.blocks.0.conv.weight"):
        assert not torch.equal(first[key], last[key])
    assert all(torch.equal(first[key], last[key]) for key in first if key.startswith("stages.2.blocks."))


def test_audio_of_a_whole_image_is_not_that_of_a_crop(store):
    with pytest.raises(CrowdExitError, match=r"no data\.voices"):
        read_recipe("audiocsrnet-lite-hearing", {"data.store": store, "data.voices": store.parent})


def test_audio_never_reaches_outputs_without_audio(trained):
    network, _ = zoo.load(trained)
    torch.manual_seed(1)
    image, log_mel = torch.randn(2, 3, 64, 96), torch.randn(2, 1, 96, 64)
    half = inputs(image, log_mel, torch.tensor([True, False]))
    with torch.inference_mode():
        without_audio, has_audio = network(inputs(image)), network(half)
        final = network.stages[2].project[2].weight.detach()
    assert final.abs().max() > 0
    torch.testing.assert_close(has_audio["V1"].density, without_audio["V1"].density)
    for name in ("AV2", "final"):
        assert not torch.allclose(has_audio[name].density[0], without_audio[name].density[0])
        torch.testing.assert_close(has_audio[name].density[1], without_audio[name].density[1])


def test_branches_are_density_exits_too(store, trained, tmp_path):
    """Classifier-wise, on the frozen backbone; AV1 from V1."""
    recipe = tiny(
        store,
        "branches",
        model="audiocsrnet-lite",
        changes={},
        start=trained / "model.safetensors",
        exits=[
            {"name": "AV1", "place": "AV1", "kind": "density", "start": "V1"},
            {"name": "V0-wide", "place": "V0", "kind": "density", "options": {"density_widths": [6]}},
            {"name": "V0", "place": "V0", "kind": "density", "start": "V0", "options": {"density_context": [4, 4]}},
        ],
        loss="poisson",
        epochs=1,
        tied=True,
        local=1.0,
        data={"canvas": [64, 64], "draws": 4, "val_ids": "?_[01]"},
    )
    run(recipe, tmp_path)
    before, after = best(trained), best(tmp_path)
    kept = [key for key in before if not key.startswith("branches.V0.")]
    assert same({k: after[k] for k in kept}, {k: before[k] for k in kept})
    assert (after["branches.V0.convs.0.weight"] - before["branches.V0.convs.0.weight"]).abs().max() < 0.02
    assert after["branches.V0.context.out.weight"].abs().max() > 0, "it starts at zero, and learns"
    assert not torch.equal(after["branches.AV1.conv.weight"], before["branches.V1.conv.weight"])
    assert (after["branches.AV1.conv.weight"] - before["branches.V1.conv.weight"]).abs().max() < 0.02
    assert after["branches.V0-wide.convs.0.weight"].shape[0] == 6


def test_features_of_negatives_are_cached(store, trained, tmp_path):
    """And never taken for those of others."""

    def textures(out: str, share: float, **negatives: Any) -> dict[str, torch.Tensor]:
        recipe = tiny(
            store,
            "branches",
            model="audiocsrnet-lite",
            changes={},
            start=trained / "model.safetensors",
            exits=[{"name": "V0", "place": "V0", "kind": "density"}],
            loss="poisson",
            epochs=2,
            cache={"folder": tmp_path / "features"},
            data={"canvas": [64, 64], "views": 2, "val_ids": "?_[01]", "negatives": {"share": share, **negatives}},
        )
        run(recipe, tmp_path / out)
        return best(tmp_path / out)

    first = textures("first", 0.5)
    assert same(textures("again", 0.5), first)
    with pytest.raises(CrowdExitError, match="a feature cache of other data"):
        textures("more", 0.6)
    cv2.imwrite(str(tmp_path / "place.png"), np.full((64, 64, 3), 90, np.uint8))
    with pytest.raises(CrowdExitError, match="a feature cache of other data"):
        textures("place", 0.5, background=tmp_path / "place.png")


def gradients(joint: JointTraining, store: Path, exit: str) -> set[str]:
    """The parameters that the loss of one exit reaches."""
    data = make_data(joint.recipe, joint.network)
    batch = torch.utils.data.default_collate([data.train_set[0, draw] for draw in range(2)])
    joint.network.requires_grad_(True)
    loss = exit_loss(dict(joint.answers(batch, joint.phases[0].exits))[exit], batch, joint.recipe)
    named = dict(joint.network.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name for name, grad in zip(named, found, strict=True) if grad is not None}


@pytest.mark.parametrize("until", [0, 1])
def test_detached_exits_train_themselves_alone(store, tmp_path, until):
    joint = experiment(lite(store, detach_until=until, detached=["V0"]), tmp_path)
    for exit in ("V0", "V1"):
        reached = gradients(joint, store, exit)
        own = {name for name in reached if name.startswith(f"branches.{exit}.")}
        assert own
        assert (reached == own) == (exit == "V0" or until > 0)
    assert any(name.startswith("stages.0.blocks.2.") for name in gradients(joint, store, "final"))


def test_rates_of_groups_and_what_they_freeze(store, tmp_path):
    joint = experiment(lite(store, optimiser={"lr": 0.01}), tmp_path)
    joint.begun = 0
    joint.trainer = type("T", (), {"estimated_stepping_batches": 4})()
    rates = {}
    for group in joint.configure_optimizers()["optimizer"].param_groups:
        rates |= {id(parameter): group["initial_lr"] for parameter in group["params"]}
    named = dict(joint.network.named_parameters())
    assert rates[id(named["stages.0.blocks.2.0.conv_pw.weight"])] == pytest.approx(0.003)
    assert rates[id(named["stages.1.to_16.0.0.conv_pw.weight"])] == pytest.approx(0.003)
    assert rates[id(named["stages.1.lateral_16.weight"])] == rates[id(named["branches.V1.conv.bias"])] == 0.01
    frozen = {name for name in named if id(named[name]) not in rates}
    assert {name for name in named if name.startswith(("stages.0.conv_stem", "stages.2."))} < frozen
    assert all(not named[name].requires_grad for name in frozen)


def test_norms_stay_in_evaluation_mode(store, tmp_path):
    joint = experiment(lite(store), tmp_path)
    joint.begun = 0
    joint.train()
    norms = [m for m in joint.network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert joint.network.stages[1].training
    assert not any(norm.training for norm in norms)
    assert all(norm.weight.requires_grad for name, norm in joint.network.named_modules() if name == "stages.1.norm")
    median_count = experiment(lite(store, norms="trained", norm_batches=0), tmp_path)
    assert median_count.train().network.stages[1].norm.training


def test_fresh_norms_take_the_statistics_of_the_batches(store, tmp_path):
    recipe = lite(store)
    joint = experiment(recipe, tmp_path)
    network = joint.network
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name.startswith(("stages.0.", "stages.1.to_", "stages.2.")):
            module.running_mean.fill_(0.1)  # as published weights have it
    data = make_data(recipe, network)
    batches = [torch.utils.data.default_collate([data.train_set[i, 0], data.train_set[i + 1, 0]]) for i in (0, 4)]
    seen: list[torch.Tensor] = []
    with network.stages[1].norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
        assert start_norms(network, lambda: batches) == 7
    norm = network.stages[1].norm
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert norm.momentum == 0.1
    assert not norm.training
    assert (network.stages[0].bn1.running_mean == 0.1).all()
    assert start_norms(network, lambda: pytest.fail("nothing is fresh any more")) == 0


def test_the_average_sets_in_over_the_first_steps(store):
    recipe = lite(store, ema=0.9, ema_warmup=4)
    layer = nn.Linear(1, 1, bias=False)
    average, expected = averaged(layer, recipe), 0.0
    for step, value in enumerate([3.0, 5.0, -2.0, 8.0, 1.0]):
        with torch.no_grad():
            layer.weight.fill_(value)
        average.update_parameters(layer)
        decay = 0.0 if step == 0 else min(0.9, (1 + step) / (4 + step))
        expected = decay * expected + (1 - decay) * value
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_validation_uses_audio_only_if_training_does(store):
    for hear, has_audio in ((0.0, False), (0.5, True)):
        recipe = lite(store, data={"hear": hear})
        items = make_data(recipe, zoo.build(zoo.Spec("audiocsrnet-lite", changes=CHANGES))).val_set
        assert bool(items[0]["has_audio"]) == has_audio
        assert items[0]["image"].shape == (3, 96, 160)


def test_negatives_of_a_recipe(store, tmp_path):
    network = zoo.build(zoo.Spec("audiocsrnet-lite", changes=CHANGES))
    with pytest.raises(CrowdExitError, match=r"none\.h5: no such prepared file"):
        make_data(lite(store, data={"negatives": {"share": 0.1, "images": tmp_path / "none.h5"}}), network)
    with pytest.raises(CrowdExitError, match=r"none\.jpg: no such file"):
        make_data(lite(store, data={"negatives": {"share": 0.1, "background": tmp_path / "none.jpg"}}), network)
    data = make_data(lite(store, data={"negatives": {"share": 1.0}}), network)
    assert [data.train_set[i, 0]["count"].item() for i in range(4)] == [0] * 4


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"optimiser": {"groups": {"stages.9.*": 0}}}, r"optimiser\.groups: no parameter matches 'stages\.9\.\*'"),
        ({"detached": ["V9"]}, "detached: no early exit 'V9' is trained"),
        ({"changes": {**CHANGES, "density_activation": "none"}}, "poisson: the density of the exit 'final' can be neg"),
        ({"data": {"canvas": [72, 64]}}, "canvas: the sides have to be multiples of 32 for audiocsrnet-lite"),
    ],
)
def test_what_does_not_fit(store, tmp_path, keys, says):
    with pytest.raises(CrowdExitError, match=says):
        run(lite(store, **keys), tmp_path)


def test_exits_that_start_from_none(store, trained, tmp_path):
    keys: dict[str, Any] = {"changes": {}, "start": trained / "model.safetensors", "detached": []}
    exits = [{"name": "AV1", "place": "AV1", "kind": "density", "start": "V9"}]
    with pytest.raises(CrowdExitError, match=r"it has no exit 'V9' for 'AV1' to start from"):
        run(lite(store, exits=exits, lambdas={}, **keys), tmp_path)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"stage": "branches", "freeze_depthwise": True}, "the stage 'branches' knows no freeze_depthwise"),
        ({"stage": "branches", "optimiser": {"groups": {"*": 0}}}, "knows no optimiser.groups"),
        ({"stage": "layer-wise", "detach_until": 3}, "knows no 'detached' and no 'detach_until'"),
        ({"norm_batches": 3}, "norms: frozen"),
        ({"loss": "poisson", "data": {"stride": 1}}, "data.stride 8"),
        ({"data": {"whole": True, "negatives": {"share": 0.1}}}, "whole images are only flipped"),
        ({"data": {"wide_scale": [2, 1]}}, "wide_scale is a lowest and a highest factor"),
        ({"data": {"degradations": {"grey": 0.6, "cast": 0.6}}}, "add up to 1 at most"),
        ({"exits": [{"name": "a", "place": "AV1", "kind": "density", "start": "V1"}]}, "set start"),
    ],
)
def test_recipes_that_mean_nothing(keys, says):
    exits = [{"name": "V1", "place": "V1", "kind": "density"}]
    with pytest.raises(ValueError, match=says):
        Recipe.model_validate({"stage": "end-to-end", "model": "audiocsrnet-lite", "exits": exits, **keys})


def test_a_fold_is_left_out(store):
    """Of the samples that are drawn it has none; a fold that is everything is refused."""
    whole = make_data(lite(store), zoo.build(zoo.Spec("audiocsrnet-lite", (), CHANGES))).train_set.ids
    kept = [
        make_data(lite(store, data={"leave_out": f"{number}/2"}), zoo.build(zoo.Spec("audiocsrnet-lite", (), CHANGES)))
        for number in range(2)
    ]
    assert sorted(id for data in kept for id in data.train_set.ids) == sorted(whole)
    assert all(data.train_set.ids for data in kept)
    with pytest.raises(CrowdExitError, match="no sample of train is left"):
        make_data(lite(store, data={"leave_out": "0/1"}), zoo.build(zoo.Spec("audiocsrnet-lite", (), CHANGES)))
