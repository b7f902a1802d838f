"""Batch normalisation folded into convolutions: the same answers from every network."""

from __future__ import annotations

import networks
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from crowdexit.inference.models import open_model
from crowdexit.models import zoo
from crowdexit.models.folding import fold_norms
from crowdexit.models.network import MultiExitNetwork

SMALL = {"size": [64, 64], "outputs": 3, "top": 0}
LITE = zoo.Spec(
    "audiocsrnet-lite",
    tuple(zoo.ExitSpec(place, place, "density") for place in ("V0", "V1", "AV1", "AV2")),
    {"size": [64, 64]},
)


def norms(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, _BatchNorm)]


def settled(spec: zoo.Spec) -> MultiExitNetwork:
    torch.manual_seed(1)
    return networks.settled(zoo.build(spec))


SPECS = {
    **networks.SPECS,
    "lite": LITE,
    "densenet121": zoo.Spec("densenet121", (), SMALL),
    "inceptionv3": zoo.Spec("inceptionv3", (), {**SMALL, "size": [96, 96]}),
}


@pytest.mark.parametrize("name", SPECS)
def test_folding_changes_no_answer(name):
    network = settled(SPECS[name])
    features = networks.batch(network, 2)
    with torch.no_grad():
        before = network(features)
        count = len(norms(network))
        folded = fold_norms(network)
        after = network(features)
    assert len(norms(network)) == count - folded
    for exit, answer in before.items():
        scale = float(answer.value.abs().max())
        torch.testing.assert_close(after[exit].value, answer.value, rtol=1e-4, atol=1e-4 * scale)
    assert fold_norms(network) == 0


def test_all_of_the_default_network_are_folded():
    network = settled(LITE)
    fold_norms(network)
    assert norms(network) == []


def test_a_checkpoint_is_opened_folded(tmp_path):
    network = settled(LITE)
    zoo.save(network, LITE, tmp_path / "model.safetensors")
    opened, _, runtime = open_model(tmp_path / "model.safetensors", "eager")
    assert norms(opened) == []
    features = networks.batch(network, 1)
    with torch.no_grad():
        expected = network(features)
    for name, answer in runtime.ready(opened).stream(features):
        torch.testing.assert_close(answer.value, expected[name].value, rtol=1e-4, atol=0)
