"""Heads that start from a regression say at once what the token knows."""

from __future__ import annotations

import pytest
import torch
from test_train_vit import EXITS, SMALL
from tiny_runs import best, run, tiny
from torch import nn

from crowdexit.backbones.vit import TokenHead, ViTConfig
from crowdexit.exits.head import MLPHead
from crowdexit.training.fit import _fit


@pytest.mark.parametrize("kind", ["final", "branch"])
def test_a_count_in_a_direction_that_hardly_varies(kind):
    torch.manual_seed(0)
    dim, scale = 48, 100.0
    head: nn.Sequential = MLPHead(dim, 1, hidden=64) if kind == "branch" else TokenHead(ViTConfig(dim=dim)).layers
    logs = torch.rand(900) * 6  # of 0 to 400 heads
    direction = torch.randn(dim)
    tokens = torch.randn(900, dim) * torch.logspace(-2, 0, dim) + 0.05 * logs[:, None] * direction + 3
    _fit(head, tokens[:600].double(), logs[:600].double(), scale)
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
    for name in ("1-add", "2-heard"):  # whose heads see several tokens
        assert torch.equal(fitted[f"branches.{name}.head.0.weight"], plain[f"branches.{name}.head.0.weight"])
    run(tiny(store, "count", fit=10, loss="balanced", **keys), tmp_path / "final")
    first = best(tmp_path / "final")["final.layers.0.weight"]
    torch.testing.assert_close(first.abs(), first[:1].abs().expand_as(first))


@pytest.mark.parametrize(("stage", "keys"), [("density", {}), ("hearing", {})])
def test_not_for_every_stage(store, stage, keys):
    with pytest.raises(ValueError, match="say a count"):
        tiny(store, stage, fit=10, **keys)
