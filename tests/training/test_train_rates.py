"""Several learning rates in one command: each branch keeps its own best, other stages the best run."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import EXITS, best, run, tiny

from crowdexit.models import zoo
from crowdexit.training.branches import BranchTraining
from crowdexit.training.modules import BackboneTraining, Diverged, TrainingError, listed
from crowdexit.training.run import train

FOLDERS = ("lr-0.01", "lr-1e-05")


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_branches_try_all_rates_side_by_side(store, backbone, tmp_path, schedule):
    rates = [1e-2, 1e-4]
    keys = {"start": backbone, "local": 1.0, "ema": 0.5}
    run(tiny(store, "branches", **keys, optimiser={"rates": rates, "schedule": schedule}), tmp_path / "both")
    network, spec = zoo.load(tmp_path / "both")
    assert network.exit_names == ["V1", "AV1", "AV2-cnn", "final"]
    errors, alone = {}, {}
    for rate in rates:
        run(tiny(store, "branches", **keys, optimiser={"lr": rate, "schedule": schedule}), tmp_path / f"{rate}")
        alone[rate] = best(tmp_path / f"{rate}")
        _, of_one = zoo.load(tmp_path / f"{rate}")
        errors[rate] = {e["name"]: of_one.meta["validation"][e["name"]]["error"] for e in EXITS}
    for e in EXITS:
        name = e["name"]
        winner = min(rates, key=lambda rate: errors[rate][name])
        assert spec.meta["validation"][name]["lr"] == winner
        assert spec.meta["validation"][name]["error"] == errors[winner][name]
        for key, tensor in network.branches[name].state_dict().items():
            assert torch.equal(tensor, alone[winner][f"branches.{name}.{key}"]), key


def test_a_backbone_is_trained_with_one_rate_after_the_other(store, backbone, tmp_path):
    recipe = tiny(store, "density", start=backbone, epochs=1, optimiser={"rates": [1e-2, 1e-5]})
    train(recipe, tmp_path / "out", accelerator="cpu")
    errors = {name: zoo.read_spec(tmp_path / "out" / name / "model.safetensors").meta["error"] for name in FOLDERS}
    winner = min(errors, key=errors.__getitem__)
    chosen = tmp_path / "out" / "model.safetensors"
    assert chosen.read_bytes() == (tmp_path / "out" / winner / "model.safetensors").read_bytes()
    with pytest.raises(TrainingError, match="already holds a run"):
        train(recipe, tmp_path / "out", accelerator="cpu")
    before = chosen.stat().st_mtime_ns
    train(recipe, tmp_path / "out", accelerator="cpu", resume=True)
    assert chosen.stat().st_mtime_ns == before
    with pytest.raises(TrainingError, match="one after the other by one process"):
        train(recipe, tmp_path / "many", accelerator="cpu", devices=2)


def test_a_rate_that_diverges_does_not_end_the_search(store, backbone, tmp_path, monkeypatch):
    ends = BackboneTraining.on_validation_epoch_end

    def refuse(self):
        if self.recipe.optimiser.lr == 1e-2:
            raise Diverged("epoch 1: the network diverged")
        ends(self)

    monkeypatch.setattr(BackboneTraining, "on_validation_epoch_end", refuse)
    train(
        tiny(store, "density", start=backbone, epochs=1, optimiser={"rates": [1e-2, 1e-5]}),
        tmp_path / "out",
        accelerator="cpu",
    )
    assert zoo.read_spec(tmp_path / "out" / "model.safetensors").meta["recipe"]["optimiser"]["lr"] == 1e-5
    with pytest.raises(TrainingError, match="diverged with every learning rate"):
        train(
            tiny(store, "density", start=backbone, epochs=1, optimiser={"rates": [1e-2]}),
            tmp_path / "none",
            accelerator="cpu",
        )


@pytest.mark.parametrize(("stage", "loop"), [("density", BackboneTraining), ("branches", BranchTraining)])
def test_a_plateau_and_early_stopping_count_epochs_as_keras_does(store, backbone, tmp_path, monkeypatch, stage, loop):
    """The first epoch is the best: the rate falls after two that are no better, the run ends after four."""
    rates: list[set[float]] = []
    own = loop.on_validation_epoch_end

    def errors(self):
        names = {row[0] for row in self.rows}
        self.rows = []
        return {name: {"error": 1.0 if rates else 0.5} for name in names}

    def noted(self):
        own(self)
        rates.append({group["lr"] for optimiser in listed(self.optimizers()) for group in optimiser.param_groups})

    monkeypatch.setattr("crowdexit.training.modules.Validation.collect", errors)
    monkeypatch.setattr(loop, "on_validation_epoch_end", noted)
    optimiser = {"lr": 1e-3, "schedule": "plateau", "factor": 0.5, "patience": 2}
    run(tiny(store, stage, start=backbone, epochs=9, stop=4, optimiser=optimiser), tmp_path)
    assert rates == [{1e-3}, {1e-3}, {5e-4}, {5e-4}, {2.5e-4}]
