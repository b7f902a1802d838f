"""An exit is added by its own file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crowdexit.models import zoo
from crowdexit.models.exits import registry
from crowdexit.models.exits.registry import ExitLocation, exit_kinds, register_exit
from crowdexit.models.stages import Exit, ExitOutput, Features, inputs


class MeanExit(Exit):
    """The mean of the map, and two dense layers."""

    def __init__(self, channels: int, width: int, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, width), nn.ReLU(), nn.Linear(width, 1))
        self.scale = scale

    def forward(self, features: Features) -> ExitOutput:
        return ExitOutput(self.layers(features.grid().mean((2, 3)))[:, 0] * self.scale)


@pytest.fixture
def mean(monkeypatch):
    """A kind of exits that is called ``mean``."""
    monkeypatch.setattr(registry, "_KINDS", dict(exit_kinds()))

    @register_exit("mean", reads=("map", "tokens"), any_size=True, options={"width": 8})
    def make(at: ExitLocation) -> MeanExit:
        return MeanExit(at.channels, **at.settings_for("width", "scale"))


SMALL = {"size": (128, 64), "width": 0.125, "audio_width": 0.125}


@pytest.mark.usefixtures("mean")
def test_a_kind_of_exits_fits_where_it_says(tmp_path):
    exits = (zoo.ExitSpec("early", "V1", "mean"), zoo.ExitSpec("wide", "AV2", "mean", {"width": 32}))
    spec = zoo.Spec("audiocsrnet-s", exits, SMALL)
    network = zoo.build(spec).eval()
    assert [network.exit_module(name).layers[0].out_features for name in ("early", "wide")] == [8, 32]
    assert network.exit_module("early").kind == "mean"
    assert network.exit_module("early").scale == 100  # of the network's configuration
    assert all("mean" in zoo.build(zoo.Spec(name)).branch_kinds("1") for name in ("transcrowd-token-s", "resnet18"))
    zoo.save(network, spec, tmp_path / "model.safetensors")
    loaded, _ = zoo.load(tmp_path)
    features = inputs(torch.zeros(1, 3, 64, 128))
    with torch.no_grad():
        assert loaded(features)["wide"].value == network(features)["wide"].value
    with pytest.raises(zoo.ZooError, match=r"no option 'depth' \(it has .*width\)"):
        zoo.build(zoo.Spec("audiocsrnet-s", (zoo.ExitSpec("e", "V1", "mean", {"depth": 2}),), SMALL))


def test_what_the_kinds_can_do():
    kinds = exit_kinds()
    assert {name for name, kind in kinds.items() if kind.has_density} == {"density"}
    assert {name for name, kind in kinds.items() if kind.any_size} == {"density"}
    assert {name for name, kind in kinds.items() if kind.adds_audio} == {"slvit-audio"}
    assert {name for name, kind in kinds.items() if "map" in kind.reads} == {"cnn", "slvit", "density"}


@pytest.mark.parametrize(
    ("model", "changes", "place", "kinds"),
    [
        ("audiocsrnet-s", {}, "AV1", ["cnn", "slvit"]),
        ("audiocsrnet-lite", {}, "V0", ["density"]),
        ("audiocsrnet-lite", {"view": "fit"}, "V0", ["cnn", "density", "slvit"]),
        ("resnet18", {}, "2", ["cnn", "slvit"]),
    ],
)
def test_kinds_of_a_place(model, changes, place, kinds):
    assert sorted(zoo.build(zoo.Spec(model, (), changes)).branch_kinds(place)) == kinds


def test_kinds_of_a_transformer():
    without, with_audio = (set(zoo.build(zoo.Spec(f"transcrowd-token{size}")).branch_kinds("1")) for size in ("", "-s"))
    assert with_audio - without == {"slvit-audio"}
    assert len(without) == 11
