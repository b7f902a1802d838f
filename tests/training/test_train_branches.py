"""Classifier-wise training: the backbone stays as it is, and each branch as if it were alone."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import EXITS, TINY, best, last, run, same, tiny

from crowdexit.models import zoo
from crowdexit.models.backbones.vgg import VGGFront
from crowdexit.training.branches import BranchTraining, add_branches
from crowdexit.training.losses import local_error
from crowdexit.training.modules import TrainingError
from crowdexit.training.run import start_branches


def part(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def backbone_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v for k, v in weights.items() if not k.startswith("branches.")}


@pytest.mark.parametrize("ema", [0, 0.5])
def test_backbone_is_left_alone(store, backbone, tmp_path, ema):
    before = best(backbone.parent)
    after = run(tiny(store, "branches", start=backbone, ema=ema), tmp_path)
    assert any("running_mean" in key for key in before)
    assert same(backbone_of(part(after, "network.")), before)
    assert same(backbone_of(best(tmp_path)), before)


def test_parts_of_a_branch_can_stay(store, backbone, tmp_path):
    exits = [{"name": "AV1", "place": "AV1", "kind": "slvit"}]
    run(tiny(store, "branches", start=backbone, exits=exits), tmp_path / "first")
    first = tmp_path / "first" / "model.safetensors"
    keys = {"start": first, "branches_from": first, "exits": exits, "optimiser": {"lr": 1e-2, "weight_decay": 0.1}}
    run(tiny(store, "branches", frozen=["*.project.*", "*.encoder.*"], **keys), tmp_path / "second")
    before, after = (part(best(tmp_path / run), "branches.AV1.") for run in ("first", "second"))
    for key, value in before.items():
        keep_at_stage = key.startswith(("project.", "encoder."))
        assert torch.equal(value, after[key]) == keep_at_stage, key
    with pytest.raises(TrainingError, match=r"frozen: no branch has 'stages\.0'"):
        run(tiny(store, "branches", frozen=["stages.0"], **keys), tmp_path / "third")


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_together_and_alone_agree(store, backbone, tmp_path, schedule):
    keys = {"start": backbone, "ema": 0.5, "local": 1.0, "optimiser": {"schedule": schedule, "patience": 0}}
    together = run(tiny(store, "branches", **keys), tmp_path / "together")
    for e in EXITS:
        name = e["name"]
        alone = run(tiny(store, "branches", exits=[e], **keys), tmp_path / name)
        assert same(part(alone, f"network.branches.{name}."), part(together, f"network.branches.{name}."))
        prefix = f"branches.{name}."
        assert same(part(best(tmp_path / name), prefix), part(best(tmp_path / "together"), prefix))
    fresh, _ = zoo.load(backbone)
    add_branches(fresh, tiny(store, "branches", start=backbone), 0.0)
    assert not same(dict(fresh.branches["V1"].state_dict()), part(together, "network.branches.V1."))


def test_local_error_is_of_each_part():
    density = torch.zeros(2, 1, 4, 6)
    density[0, 0, 0, 0], density[0, 0, 3, 5], density[1, 0, 1, 2] = 2.0, 3.0, 5.0
    grid, heads = (2, 3), torch.tensor([5.0, 5.0])
    right = torch.tensor([[2.0, 0, 0, 0, 0, 3.0], [0, 5.0, 0, 0, 0, 0]])
    assert local_error(right, density, heads, grid).item() == pytest.approx(0, abs=1e-6)
    # The sum is right but the people are looked for elsewhere.
    assert local_error(right.flip(1), density, heads, grid).item() == pytest.approx((2 + 10) / 15 / 2)


def test_local_counts_are_learned(store, backbone, tmp_path):
    without = run(tiny(store, "branches", start=backbone), tmp_path / "without")
    local = run(tiny(store, "branches", start=backbone, local=1.0), tmp_path / "local")
    assert not any(key.startswith("readouts.") for key in without)
    assert any(key.startswith("readouts.V1.") for key in local)
    assert not same(part(local, "network.branches.V1.encoder."), part(without, "network.branches.V1.encoder."))
    assert best(tmp_path / "local").keys() == best(tmp_path / "without").keys()  # the readouts are thrown away


def test_each_stops_on_its_own_and_keeps_its_best(store, backbone, tmp_path, monkeypatch):
    """AV1's error is made to grow from the second epoch on: it stops, the others go on."""
    collect = "crowdexit.training.modules.Validation.collect"
    seen: list[list[str]] = []
    after: list[torch.Tensor] = []

    def errors(self):
        names = sorted({row[0] for row in self.rows})
        self.rows = []
        seen.append(names)
        return {name: {"error": len(seen) * (1.0 if name == "AV1" else -1.0)} for name in names}

    own = BranchTraining.on_validation_epoch_end

    def weights(self):
        own(self)
        after.append(self.network.branches["AV1"].head[0].weight.detach().clone())

    monkeypatch.setattr(collect, errors)
    monkeypatch.setattr(BranchTraining, "on_validation_epoch_end", weights)
    run(tiny(store, "branches", start=backbone, epochs=5, stop=2), tmp_path)
    assert [("AV1" in names) for names in seen] == [True, True, True, False, False]
    assert all("V1" in names and "AV2-cnn" in names for names in seen)
    assert not torch.equal(after[1], after[2])
    assert torch.equal(after[2], after[4]), "a stopped branch learns no more"
    shipped = best(tmp_path)
    assert torch.equal(shipped["branches.AV1.head.0.weight"], after[0]), "its best epoch was the first"
    ends = last(tmp_path)
    assert torch.equal(shipped["branches.V1.head.0.weight"], ends["network.branches.V1.head.0.weight"])


def test_one_pass_of_the_backbone_for_all_branches(store, backbone, tmp_path, monkeypatch):
    passes = []
    forward = VGGFront.forward

    def counted(self, features):
        assert not self.training
        passes.append(torch.is_grad_enabled())
        return forward(self, features)

    monkeypatch.setattr(VGGFront, "forward", counted)
    run(tiny(store, "branches", start=backbone, epochs=1), tmp_path)
    assert passes == [False] * 5  # ten samples and five in fours; training asks for no gradient of it


def test_changes_and_old_exits_stay(store, backbone, tmp_path):
    run(tiny(store, "branches", start=backbone, epochs=1, changes={"dropout": 0.1}), tmp_path / "one")
    first = best(tmp_path / "one")
    more = [{"name": "AV1-cnn", "place": "AV1", "kind": "cnn"}]
    start = tmp_path / "one" / "model.safetensors"
    run(tiny(store, "branches", start=start, epochs=1, changes={}, exits=more, tied=True), tmp_path / "two")
    network, spec = zoo.load(tmp_path / "two")
    assert [e.name for e in spec.exits] == ["V1", "AV1", "AV2-cnn", "AV1-cnn"]
    assert network.branches["V1"].head[2].p == network.branches["AV1-cnn"].head[2].p == 0.1
    assert network.config.size == tuple(TINY["size"])
    assert spec.meta["validation"].keys() == {"AV1-cnn"}
    second = best(tmp_path / "two")
    assert same({k: second[k] for k in first}, first)


def test_tied_heads_start_at_the_median_wherever_people_stand(store, backbone):
    network, _ = zoo.load(backbone)
    add_branches(network, tiny(store, "branches", start=backbone, tied=True), 12.0)
    for name in ("V1", "AV1", "AV2-cnn"):
        branch = network.branches[name]
        first = branch.head[0].weight.unflatten(1, (branch.cells, -1))
        assert torch.equal(first, first[:, :1].expand_as(first))
        assert branch.head[-1].bias.item() * branch.scale == pytest.approx(12.0)


@pytest.mark.parametrize(
    ("exits", "problem"),
    [
        ([{"name": "X", "place": "AV9", "kind": "cnn"}], "exit 'X': no exit location 'AV9'"),
        ([{"name": "X", "place": "V1", "kind": "mixer"}], "exit 'X': no branch of kind 'mixer' fits location V1"),
        ([{"name": "final", "place": "V1", "kind": "cnn"}], "exit 'final' already exists"),
    ],
)
def test_exits_that_do_not_fit(store, backbone, tmp_path, exits, problem):
    with pytest.raises(TrainingError, match=problem):
        run(tiny(store, "branches", start=backbone, exits=exits), tmp_path)


def test_branches_go_on_from_another_checkpoint(store, backbone, tmp_path):
    run(tiny(store, "branches", start=backbone, epochs=1), tmp_path / "one")
    there = tmp_path / "one" / "model.safetensors"
    network, _ = zoo.load(backbone)
    recipe = tiny(store, "branches", start=backbone, branches_from=there)
    add_branches(network, recipe, 12.0)
    start_branches(network, recipe, there)
    assert same({k: v for k, v in network.state_dict().items() if k in best(tmp_path / "one")}, best(tmp_path / "one"))
    run(tiny(store, "branches", start=backbone, branches_from=there, epochs=1), tmp_path / "two")
    _, spec = zoo.load(tmp_path / "two")
    assert spec.meta["recipe"]["branches_from"] == "one/model.safetensors", "no path of this machine"
    for path, exits in ((backbone, {}), (there, {"exits": [{"name": "V1", "place": "V1", "kind": "cnn"}]})):
        with pytest.raises(TrainingError, match="no branch 'V1'"):
            run(tiny(store, "branches", start=backbone, branches_from=path, **exits), tmp_path / "no")
