"""Exits that start from a regression say at once what they see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_train_vit import EXITS, SMALL
from tiny_runs import best, run, tiny
from torch import nn
from torch.nn import functional as F

from crowdexit.models.backbones.vit import TokenHead, ViTConfig
from crowdexit.models.exits import Branch, CNNExit, SLViTExit
from crowdexit.models.exits.head import MLPHead
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import Exit, Features, Stage, inputs
from crowdexit.training.fit import _fit_log, fit_exits
from crowdexit.training.recipe import Recipe


@pytest.mark.parametrize("kind", ["final", "branch"])
def test_a_count_in_a_direction_that_hardly_varies(kind):
    torch.manual_seed(0)
    dim, scale = 48, 100.0
    head: nn.Sequential = MLPHead(dim, 1, hidden=64) if kind == "branch" else TokenHead(ViTConfig(dim=dim)).layers
    logs = torch.rand(900) * 6  # of 0 to 400 heads
    direction = torch.randn(dim)
    tokens = torch.randn(900, dim) * torch.logspace(-2, 0, dim) + 0.05 * logs[:, None] * direction + 3
    _fit_log(head, tokens[:600].double(), logs[:600].double(), scale)
    with torch.inference_mode():
        said = head.eval()(tokens[600:]).squeeze(1) * scale
        nowhere = head(tokens[600:] - 5 * direction).squeeze(1) * scale
    heads = torch.expm1(logs[600:])
    assert ((said - heads).abs() / (heads + 10)).mean() < 0.1
    assert (said - heads).mean().abs() < 0.1 * heads.mean()
    torch.testing.assert_close(nowhere, torch.zeros(300), rtol=0, atol=1e-4)  # nothing is counted below zero
    # And it goes on learning from there, also where it says nothing at all.
    for shown in (tokens[:8], tokens[:8] - 5 * direction):
        head.zero_grad()
        head(shown).sum().backward()
        assert any(layer.weight.grad.abs().sum() > 0 for layer in head if isinstance(layer, nn.Linear))


class Shows(Stage):
    """A map of the image's own pixels, and any audio."""

    def forward(self, features: Features) -> Features:
        return replace(features, audio=torch.randn(len(features.visual), 5))


class WithoutAudio(Exit):
    """A final exit that nobody asks."""

    kind = "silent"


@pytest.mark.parametrize("kind", ["cnn", "slvit", "slvit-audio"])
def test_a_map_that_hardly_shows_the_heads(kind):
    """Two channels are loud; the difference of the other two knows how many heads a cell of 8×8 pixels holds."""
    torch.manual_seed(0)

    def batches():
        torch.manual_seed(1)
        for _ in range(30):
            crowding = torch.rand(8, 1, 1, 1) * 3
            local = torch.poisson(torch.rand(8, 1, 4, 4) * torch.exp(crowding))
            report = F.interpolate(torch.log1p(local), scale_factor=8)
            noise = torch.randn(8, 1, 32, 32)
            image = torch.cat([5 * torch.randn(8, 1, 32, 32), noise + 0.1 * report, noise - 0.1 * report], dim=1)
            yield {"image": image, "density": local, "count": local.sum((1, 2, 3)), "id": [str(i) for i in range(8)]}

    shaped = {"hidden": 16, "scale": 100.0}
    branch: Branch
    if kind == "cnn":
        branch = CNNExit(3, (32, 32), pool=8, **shaped)
    else:
        branch = SLViTExit(3, (32, 32), patch=8, dim=8, heads=2, audio=0 if kind == "slvit" else 5, **shaped)
    network = MultiExitNetwork([Shows()], WithoutAudio(), {"1": 0}, ViTConfig())
    network.add_exit("1", "1", branch)
    recipe = Recipe(stage="branches", model="x", exits=[{"name": "1", "place": "1", "kind": "cnn"}], even=0.7, least=5)
    assert fit_exits(network, ["1"], batches, recipe) == ["1"]
    errors, median_count = [], []
    with torch.inference_mode():
        for batch in batches():
            heads = batch["count"]
            features = Shows()(inputs(batch["image"]))
            errors.append(((branch(features).value - heads).abs() / (heads + 5)).mean())
            median_count.append(((heads.median() - heads).abs() / (heads + 5)).mean())
    assert torch.stack(errors).mean() < 0.45 * torch.stack(median_count).mean()


def test_batch_norm_would_undo_the_fit():
    network = MultiExitNetwork([Shows()], WithoutAudio(), {"1": 0}, ViTConfig())
    network.add_exit("1", "1", CNNExit(3, (32, 32), pool=8, audio=5))
    recipe = Recipe(stage="branches", model="x", exits=[{"name": "1", "place": "1", "kind": "cnn"}])
    assert fit_exits(network, ["1"], lambda: iter(()), recipe) == []


def test_a_run_starts_there(store, tmp_path):
    run(tiny(store, "count", epochs=1, loss="balanced", **SMALL), tmp_path / "start")
    keys = {"epochs": 1, "start": tmp_path / "start" / "model.safetensors", "optimiser": {"lr": 1e-9}, **SMALL}
    exits = [*EXITS, {"name": "2-vit", "place": "2", "kind": "vit"}]
    run(tiny(store, "branches", exits=exits, loss="balanced", fit=10, **keys), tmp_path / "fitted")
    run(tiny(store, "branches", exits=exits, loss="balanced", **keys), tmp_path / "plain")
    fitted, plain = best(tmp_path / "fitted"), best(tmp_path / "plain")
    for name in ("1-mlp", "2-mixer", "2-vit"):
        first = fitted[f"branches.{name}.head.0.weight"]
        torch.testing.assert_close(first.abs(), first[:1].abs().expand_as(first))
        assert not torch.equal(first, plain[f"branches.{name}.head.0.weight"])
    convolution = fitted["branches.1-add.conv.weight"]  # every channel and place of the window looks the same way
    torch.testing.assert_close(convolution, convolution[:1, :, :1, :1].expand_as(convolution))
    first = fitted["branches.2-heard.head.0.weight"].unflatten(1, (-1, 4))  # of each patch, the audio's last
    torch.testing.assert_close(first[:, :-1], first[:, :1].expand_as(first[:, :-1]))
    torch.testing.assert_close(first[:, -1], torch.zeros_like(first[:, -1]), rtol=0, atol=1e-7)
    run(tiny(store, "count", fit=10, loss="balanced", **keys), tmp_path / "final")
    first = best(tmp_path / "final")["final.layers.0.weight"]
    torch.testing.assert_close(first.abs(), first[:1].abs().expand_as(first))


@pytest.mark.parametrize(("stage", "keys"), [("density", {}), ("hearing", {})])
def test_not_for_every_stage(store, stage, keys):
    with pytest.raises(ValueError, match="output a count"):
        tiny(store, stage, fit=10, **keys)
