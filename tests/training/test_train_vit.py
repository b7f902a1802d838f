"""TransCrowd trains from the same recipes: its count on crops, validated on tiles, and its branches."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_runs import TINY, best, run, tiny
from typer.testing import CliRunner

from crowdexit.cli.main import app
from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.training.run import train

VIT = {"size": [64, 64], "dim": 12, "depth": 3, "heads": 2, "hidden": 8, "slvit_dim": 4, "slvit_heads": 2}
SMALL = {"model": "transcrowd-token-s", "changes": {**VIT, "audio_width": 0.0625}}
EXITS = [
    {"name": "1-mlp", "place": "1", "kind": "mlp"},
    {"name": "1-add", "place": "1", "kind": "cnn-add"},
    {"name": "2-mixer", "place": "2", "kind": "mixer"},
    {"name": "2-heard", "place": "2", "kind": "slvit-audio"},
]


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("vit")
    run(tiny(store, "count", epochs=2, loss="balanced", ema=0.5, **SMALL), out)
    return out / "model.safetensors"


@pytest.mark.parametrize("view", ["tiles", "fit"])
@pytest.mark.parametrize("variant", ["token", "gap"])
def test_counts(store, tmp_path, view, variant):
    changes = {**SMALL["changes"], "view": view}
    run(tiny(store, "count", epochs=1, loss="mae", model=f"transcrowd-{variant}-s", changes=changes), tmp_path)
    network, spec = zoo.load(tmp_path)
    assert (network.config.view, network.config.task) == (view, variant)
    # The final exit is deaf: there is one figure, not the same one twice.
    assert set(spec.meta["validation"]) == {"epoch", "silent"}


def test_the_ears_first(store, tmp_path):
    run(tiny(store, "hearing", epochs=1, **SMALL), tmp_path)
    assert zoo.load(tmp_path)[1].meta["validation"]["sound"]


def test_branches_leave_the_backbone_alone(store, trained, tmp_path):
    keys = {"start": trained, "exits": EXITS, "loss": "balanced", "local": 1.0, "tied": True, "ema": 0.5}
    run(tiny(store, "branches", epochs=2, **SMALL, **keys), tmp_path / "all")
    before, after = best(trained.parent), best(tmp_path / "all")
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert len(after) > len(before)
    network, _ = zoo.load(tmp_path / "all")
    assert network.exit_names == ["1-mlp", "1-add", "2-mixer", "2-heard", "final"]
    # A branch comes out the same whichever are trained beside it.
    run(tiny(store, "branches", epochs=2, **SMALL, **{**keys, "exits": EXITS[3:]}), tmp_path / "one")
    alone = best(tmp_path / "one")
    for name in alone:
        if name.startswith("branches.2-heard"):
            torch.testing.assert_close(alone[name], after[name], rtol=1e-5, atol=1e-6)


def test_what_it_cannot_be_trained_for(store, tmp_path):
    with pytest.raises(CrowdExitError, match="transcrowd-token-s makes no density map: its stage is 'count'"):
        train(tiny(store, "density", **SMALL), tmp_path)
    with pytest.raises(CrowdExitError, match="takes no audio"):
        train(tiny(store, "hearing", model="transcrowd-token-s", changes={**VIT, "audio_width": 0}), tmp_path)


def test_a_table_of_runs(store, trained, tmp_path):
    keys = {"start": trained, "loss": "balanced", "epochs": 1, **SMALL}
    run(tiny(store, "end-to-end", exits=EXITS[:1], **keys), tmp_path / "joint")
    data, out = ["--data", str(store)], ["--out", str(tmp_path / "tables")]
    done = CliRunner().invoke(app, ["table", str(tmp_path / "joint"), str(trained), *data, *out])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "tables" / "table.md").read_text("utf-8")
    assert "## End-to-end, branches after layer 1" in text
    assert re.search(r"\| MLP-EE \| \d+\.\d\d \| \d+\.\d\d \|", text)
    done = CliRunner().invoke(app, ["table", str(trained), "--data", str(tmp_path / "other.h5"), *out])
    assert "name that file with --data" in str(done.exception)


def test_transformer_with_an_audiocsrnet_front_uses_audio(store, backbone, tmp_path):
    """Its stem and ears are the other's, and stay as they are where the recipe says so."""
    frozen = ["stages.0", "stages.1.embedding.patch_embed.0"]
    changes = {**SMALL["changes"], "stem_width": 0.0625}
    keys = {"senses": str(backbone), "frozen": frozen, "loss": "balanced", "local": 1.0, "model": SMALL["model"]}
    last = run(tiny(store, "count", epochs=1, changes=changes, **keys), tmp_path / "run")
    theirs = best(backbone.parent)
    ours = {key.removeprefix("network."): value for key, value in last.items() if key.startswith("network.")}
    pairs = {"stages.0.": "stages.1.", "stages.1.embedding.patch_embed.0.": "stages.0.layers."}
    for own, other in pairs.items():
        of_part = [key for key in ours if key.startswith(own)]
        assert of_part
        assert all(torch.equal(ours[key], theirs[other + key.removeprefix(own)]) for key in of_part)
    recipe = zoo.read_spec(tmp_path / "run" / "model.safetensors").meta["recipe"]
    assert recipe["senses"] == "/".join(backbone.parts[-2:])  # not where it lay
    assert any(key.startswith("readout.") for key in last)
    assert not any(key.startswith("readout.") for key in best(tmp_path / "run"))
    for wrong, words in (
        (
            {"model": "audiocsrnet-s", "changes": TINY, "frozen": [], "local": 0.0},
            "a transformer with an audio encoder",
        ),
        ({"senses": str(tmp_path / "run")}, "takes them from an AudioCSRNet"),
        ({"changes": {**changes, "stem_width": 0.125}}, "another shape of 'stages.1.embedding"),
        ({"changes": {**changes, "audio_width": 0, "stem": "conv"}}, "a transformer with an audio encoder"),
    ):
        recipe = tiny(store, wrong.pop("stage", "count"), epochs=1, **{"changes": changes, **keys, **wrong})
        with pytest.raises(CrowdExitError, match=words):
            train(recipe, tmp_path / "wrong")


def test_only_patches_can_be_read_off(store, tmp_path):
    with pytest.raises(CrowdExitError, match="no patches to read"):
        train(tiny(store, "density", local=1.0), tmp_path)
