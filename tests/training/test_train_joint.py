"""End-to-end and layer-wise: what is added, what is frozen, where the later steps start."""

from __future__ import annotations

import signal

import lightning as L
import pytest
import torch
from tiny_runs import EXITS, TINY, best, last, run, same, tiny

from crowdexit.data.dataset import CrowdDataset, Setting
from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.training.joint import JointTraining, Phase, phases
from crowdexit.training.losses import exit_loss
from crowdexit.training.modules import record
from crowdexit.training.run import make_experiment, starting_network

VIT = {
    "model": "transcrowd-token-s",
    "changes": {"size": [64, 64], "dim": 12, "depth": 4, "heads": 2, "hidden": 8},
    "exits": [{"name": "3-mlp", "place": "3", "kind": "mlp"}, {"name": "1-vit", "place": "1", "kind": "vit"}],
}
FAMILIES = {"audiocsrnet": {"exits": EXITS}, "transcrowd": VIT}


def experiment(recipe, out) -> JointTraining:
    """As a run would begin it, but for the branches' first count."""
    L.seed_everything(recipe.seed, verbose=False)
    network, spec = starting_network(recipe)
    made = make_experiment(network, spec, recipe, out, 10.0)
    assert isinstance(made, JointTraining)
    return made


def batch_of(store, size=(128, 64)):
    with Store(store) as opened:
        data = CrowdDataset(opened, "train", opened.ids("train", "*"), Setting(size))
        return torch.utils.data.default_collate([data[i] for i in range(4)])


def test_phases(store, tmp_path):
    network = experiment(tiny(store, "end-to-end", exits=EXITS), tmp_path).network
    assert phases(network, tiny(store, "end-to-end", exits=EXITS)) == [Phase(("V1", "AV1", "AV2-cnn", "final"), 0, 3)]
    assert phases(network, tiny(store, "layer-wise", exits=EXITS)) == [
        Phase(("V1",), 0, 0),
        Phase(("AV1",), 1, 1),
        Phase(("AV2-cnn",), 2, 2),
        Phase(("final",), 3, 3),
    ]


def test_the_loss_is_the_weighted_sum(store, tmp_path):
    """l_t = l + Σ λ_b l_b, the final exit's doubled unless told otherwise."""
    recipe = tiny(store, "end-to-end", exits=EXITS, lambdas={"AV1": 0.5, "V1": 0})
    joint = experiment(recipe, tmp_path)
    joint.begun = 0
    joint.log = lambda *_, **__: None  # type: ignore[method-assign]
    joint.eval()
    batch = batch_of(store)
    answers = joint.network(record(batch))
    weights = {"V1": 0, "AV1": 0.5, "AV2-cnn": 1, "final": 2}
    wanted = sum(weight * exit_loss(answers[name], batch, recipe) for name, weight in weights.items())
    torch.testing.assert_close(joint.training_step(batch, 0), wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_end_to_end_moves_everything(store, tmp_path, family):
    recipe = tiny(store, "end-to-end", epochs=2, ema=0.5, **FAMILIES[family])
    begin = experiment(recipe, tmp_path / "x").network.state_dict()
    run(recipe, tmp_path)
    after = best(tmp_path)
    still = {k for k, v in after.items() if v.is_floating_point() and torch.equal(v, begin[k])}
    # Silence is learned only where a sample is not heard; a transformer's final exit hears nothing.
    assert {k for k in still if ".unheard" not in k and "stages.0.layers" not in k} == set()
    network, spec = zoo.load(tmp_path)
    assert set(spec.meta["validation"]) == {"epoch", *network.exit_names}


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_wise_freezes_what_came_before(store, tmp_path, family):
    recipe = tiny(store, "layer-wise", epochs=1, **FAMILIES[family])
    steps: list[dict[str, torch.Tensor]] = []
    ends = JointTraining.on_validation_epoch_end

    def noting(self):
        ends(self)
        steps.append({k: v.clone() for k, v in self.network.state_dict().items()})

    begin = {k: v.clone() for k, v in experiment(recipe, tmp_path / "x").network.state_dict().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointTraining, "on_validation_epoch_end", noting)
        run(recipe, tmp_path)
    network, _ = zoo.load(tmp_path)
    parts = phases(network, recipe)
    assert len(steps) == len(parts)
    for number, phase in enumerate(parts):
        before, after = steps[number - 1] if number else begin, steps[number]
        own = tuple(f"stages.{i}." for i in range(phase.first, phase.last + 1))
        own += tuple("final." if name == "final" else f"branches.{name}." for name in phase.exits)
        moved = {k for k in after if not torch.equal(before[k], after[k])}
        moved = {k for k in moved if number or not k.endswith("head.6.bias")}  # at the median of a run
        assert moved, phase
        assert all(k.startswith(own) for k in moved), phase


def test_where_the_later_steps_start(store, backbone, tmp_path):
    kept = tiny(store, "layer-wise", start=backbone, exits=EXITS[:1])
    trained = best(backbone.parent)
    for rest in ("kept", "fresh", backbone):
        recipe = kept.model_copy(update={"rest": rest, "start": None if rest == backbone else backbone})
        begun = experiment(recipe, tmp_path).network.state_dict()
        behind = torch.equal(begun["stages.2.blocks.0.conv.weight"], trained["stages.2.blocks.0.conv.weight"])
        front = torch.equal(begun["stages.0.layers.0.weight"], trained["stages.0.layers.0.weight"])
        assert (front, behind) == {"kept": (True, True), "fresh": (True, False)}.get(str(rest), (False, True))


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_killed_and_resumed_is_the_same(store, tmp_path, break_off, epoch):
    """Within a phase, at the end of one, at the beginning of one."""
    recipe = tiny(store, "layer-wise", epochs=2, ema=0.5, exits=EXITS[:1])
    whole = run(recipe, tmp_path / "whole")
    break_off(epoch, 1 if epoch != 2 else 0, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "broken")
    assert same(run(recipe, tmp_path / "broken", resume=True), whole)
    assert same(best(tmp_path / "broken"), best(tmp_path / "whole"))
    assert last(tmp_path / "broken")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(
    ("stage", "keys", "says"),
    [
        ("end-to-end", {"lambdas": {"V1": -1}}, "greater than or equal to 0"),
        ("end-to-end", {"lambdas": {"V1": float("nan")}}, "greater than or equal to 0|finite"),
        ("end-to-end", {"exits": []}, "needs exits"),
        ("branches", {"lambdas": {"V1": 1}}, "lambdas do not apply"),
        ("end-to-end", {"rest": "fresh"}, "knows no 'rest'"),
        ("end-to-end", {"frozen": ["stages.0"]}, "no 'frozen'"),
        ("layer-wise", {"stop": 2}, "no stop, no plateau"),
    ],
)
def test_recipes_that_mean_nothing(store, stage, keys, says):
    with pytest.raises(ValueError, match=says):
        tiny(store, stage, **{"exits": EXITS, **keys})


def test_lambdas_of_exits_that_are_there(store, tmp_path):
    with pytest.raises(CrowdExitError, match="no exit 'V9' is trained"):
        experiment(tiny(store, "end-to-end", exits=EXITS, lambdas={"V9": 1}), tmp_path)
    zero = {e["name"]: 0 for e in EXITS}
    with pytest.raises(CrowdExitError, match="the weights of V1, AV1, AV2-cnn, final are all zero"):
        experiment(tiny(store, "end-to-end", exits=EXITS, lambdas={**zero, "final": 0}), tmp_path)
    assert TINY
