"""The chain walks no further than it must, and answers in order."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from crowdexit.models.backbones.audiocsrnet import AudioCSRNetConfig
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import Exit, ExitOutput, Features, Stage, inputs


class Counting(Stage):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features: Features) -> Features:
        self.calls += 1
        return features.with_visual(features.visual + 1)


class Reading(Exit):
    kind = "reading"

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, features: Features) -> ExitOutput:
        self.calls += 1
        return ExitOutput(features.visual.mean((1, 2, 3)))


@pytest.fixture
def network() -> MultiExitNetwork:
    places = {"one": 0, "two": 1, "three": 2}
    made = MultiExitNetwork([Counting() for _ in range(4)], Reading(), places, AudioCSRNetConfig())
    made.add_exit("late", "three", Reading())
    made.add_exit("early", "one", Reading())
    made.add_exit("early-too", "one", Reading())
    return made


@pytest.fixture
def features() -> Features:
    return inputs(torch.zeros(2, 3, 8, 8))


def calls(network: MultiExitNetwork) -> list[int]:
    return [stage.calls for stage in network.stages]


def test_exits_answer_in_order_after_their_stage(network, features):
    answers = network(features)
    assert list(answers) == network.exit_names == ["early", "early-too", "late", FINAL]
    assert [a.value[0].item() for a in answers.values()] == [1, 1, 3, 4]
    assert calls(network) == [1, 1, 1, 1]


def test_nothing_behind_the_last_wanted_exit(network, features):
    assert list(network(features, ["late"])) == ["late"]
    assert calls(network) == [1, 1, 1, 0]
    assert network.branches["early"].calls == 0
    assert network.final.calls == 0


def test_stream_is_lazy(network, features):
    stream = network.stream(features)
    assert calls(network) == [0, 0, 0, 0]
    assert next(stream)[0] == "early"
    assert calls(network) == [1, 0, 0, 0]
    assert network.branches["early-too"].calls == 0
    next(stream)
    next(stream)
    stream.close()
    assert calls(network) == [1, 1, 1, 0]


def test_no_exit_wanted_costs_nothing(network, features):
    assert network(features, []) == {}
    assert calls(network) == [0, 0, 0, 0]


def test_places_and_names_are_checked(network):
    with pytest.raises(ValueError, match="no exit location 'four'"):
        network.add_exit("x", "four", Reading())
    for taken in ("late", FINAL):
        with pytest.raises(ValueError, match="already"):
            network.add_exit(taken, "one", Reading())
    with pytest.raises(KeyError):
        network.exit_module("nobody")


def test_backbone_is_all_but_the_branches(network):
    modules = network.backbone_modules()
    assert modules == [*network.stages, network.final]
    assert not any(isinstance(m, nn.ModuleDict) for m in modules)
