"""Costs are the papers' (table VIII of the SL-ViT paper), count each part once, and need no memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.cost import CostTable, cost, cost_of, measure
from crowdexit.evaluation.tradeoff import costs
from crowdexit.models import zoo
from crowdexit.models.backbones.audiocsrnet import AudioCSRNet, AudioCSRNetConfig
from crowdexit.models.stages import inputs

# place: parameters CNN, SL-ViT as printed; FLOPS CNN, SL-ViT in 10⁹; speedup
TABLE_VIII = {
    "V1": ("2.50M", "2.35M", 329.77, 328.72, 1.49),
    "AV1": ("2.52M", "2.36M", 331.37, 330.31, 1.48),
    "AV2": ("2.50M", "2.35M", 374.86, 373.81, 1.31),
}


@pytest.fixture(scope="module")
def paper() -> CostTable:
    return cost("audiocsrnet")


def test_table_viii(paper):
    assert [(e.exit, e.kind) for e in paper.exits] == [(p, k) for p in TABLE_VIII for k in ("cnn", "slvit")]
    printed = {(row[0], row[1]): row[2] for row in paper.rows()}
    for e in paper.exits:
        params_cnn, params_slvit, flops_cnn, flops_slvit, speedup = TABLE_VIII[e.exit]
        assert printed[e.exit, e.kind] == (params_cnn if e.kind == "cnn" else params_slvit)
        assert e.total_flops / 1e9 == pytest.approx(flops_cnn if e.kind == "cnn" else flops_slvit, rel=0.001)
        assert e.speedup == pytest.approx(speedup, rel=0.005)
        assert e.total_flops == 2 * e.total_macs
        assert e.speedup == paper.backbone_flops / e.total_flops


# place: parameters CNN, SL-ViT as printed; FLOPS CNN, SL-ViT in 10⁹; speedup of SL-ViT
TABLE_IV = {
    ("resnet152", "1"): ("0.78M", "0.59M", 1.66, 1.64, 13.77),
    ("resnet152", "2"): ("0.83M", "0.79M", 5.33, 5.26, 4.29),
    ("densenet201", "1"): ("0.78M", "0.59M", 2.55, 2.53, 3.39),
    ("densenet201", "2"): ("0.80M", "0.66M", 4.21, 4.17, 2.06),
    ("inceptionv3", "1"): ("0.61M", "0.56M", 2.17, 2.14, 2.65),
    ("inceptionv3", "2"): ("0.61M", "0.56M", 2.53, 2.49, 2.28),
}


@pytest.mark.parametrize(("model", "place"), TABLE_IV)
def test_table_iv(model, place):
    table = cost(model, dataset="cifar10", layer=place)
    params_cnn, params_slvit, flops_cnn, flops_slvit, speedup = TABLE_IV[model, place]
    printed = {row[1]: row[2] for row in table.rows()}
    assert printed == {"cnn": params_cnn, "slvit": params_slvit}
    flops = {e.kind: e.total_flops / 1e9 for e in table.exits}
    assert flops == pytest.approx({"cnn": flops_cnn, "slvit": flops_slvit}, rel=0.01)
    assert table.exits[1].speedup == pytest.approx(speedup, rel=0.01)


def test_the_dense_layer_of_stage_two():
    plain, dense = (cost_of(zoo.Spec("audiocsrnet", changes={"regressor": r}), "x") for r in (False, True))
    assert dense.backbone_flops - plain.backbone_flops == 2 * 1024 * 576
    assert costs(zoo.Spec("audiocsrnet", changes={"regressor": True})) == {"final": dense.backbone_flops // 2}


def test_a_scenario_has_its_own_classes_and_branches():
    """Table III: 24 heads at ResNet152's second place on sounds; d = 36 and 8 heads in InceptionV3 on CIFAR-100."""
    plain, audio = (cost("resnet152", dataset=name, branch="slvit") for name in ("cifar10", "gtzan"))
    assert plain.exits[0].branch_params == audio.exits[0].branch_params
    more = 12 * (3 * (32 * 32 + 32) + 32 * 32)  # twelve heads more: queries, keys, values with bias, and the way back
    assert audio.exits[1].branch_params - plain.exits[1].branch_params == more
    ten, hundred = (cost("inceptionv3", dataset=name, branch="cnn") for name in ("cifar10", "cifar100"))
    assert hundred.exits[0].branch_params - ten.exits[0].branch_params == 90 * 257
    wide = cost("inceptionv3", dataset="cifar100", branch="slvit", layer="1").exits[0].branch_params
    d, h, patches = 36, 8, 25
    embedding = 288 * 25 * d + d + patches * d
    encoder = 4 * d + 3 * (h * d * d + h * d) + h * d * d + d + 2 * (2 * d * d) + 3 * d
    assert wide == embedding + encoder + (patches * d * 256 + 256) + (256 * 256 + 256) + 257 * 100


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [("resnet152", "mnist", "no data set 'mnist'"), ("audiocsrnet", "cifar10", "audiocsrnet")],
)
def test_a_data_set_that_does_not_fit(model, dataset, message):
    with pytest.raises(CrowdExitError, match=message):
        cost(model, dataset=dataset)


def test_plain_data_is_what_the_command_promises(paper):
    data = paper.to_dict()
    assert list(data) == ["model", "size", "backbone_flops", "exits"]
    assert (data["model"], data["size"]) == ("audiocsrnet", "1024x576")
    assert list(data["exits"][0]) == ["exit", "kind", "branch_params", "total_flops", "total_macs", "speedup"]


def test_by_hand():
    """A small network's multiply-adds written out: layers as (channels in, out, cells, kernel)."""
    config = AudioCSRNetConfig(size=(128, 64), width=1 / 16, audio_width=1 / 16, patch=4, dim=8, heads=2, hidden=16)
    network = AudioCSRNet(config).eval()
    network.add_branch("AV1", "AV1", "slvit")
    network.add_branch("V1", "V1", "cnn")
    stages, exits = measure(network, inputs(torch.zeros(1, 3, 64, 128), torch.zeros(1, 1, 96, 64)))
    full, cells = 128 * 64, 16 * 8
    vgg = full * 9 * (3 * 4 + 4 * 4) + full // 4 * 9 * (4 * 8 + 8 * 8)
    vgg += full // 16 * 9 * (8 * 16 + 2 * 16 * 16) + cells * 9 * (16 * 32 + 2 * 32 * 32)
    mel = 96 * 64
    uses_audio = (
        mel * 9 * 4 + mel // 4 * 9 * 4 * 8 + mel // 16 * 9 * (8 * 16 + 16 * 16) + mel // 64 * 9 * 32 * (16 + 32)
    )
    fuse = [cells * 9 * a * b + 32 * 2 * b for a, b in [(32, 32), (32, 32), (32, 32), (32, 16), (16, 8), (8, 4)]]
    assert stages == [2 * vgg, 2 * uses_audio, 2 * fuse[0], 2 * sum(fuse[1:])]
    tokens, d, h = 8 + 1, 8, 2
    slvit = 8 * 32 * 16 * d + 32 * d  # eight patches, and the audio's through the summed kernel
    slvit += tokens * d * 4 * h * d + 2 * h * tokens**2 * d  # projections; queries by keys, weights by values
    slvit += tokens * 2 * d * 2 * d + (tokens * d * 16 + 16 * 16 + 16)
    cnn = cells * 9 * 32 * 16 + (16 * 8 * 16 + 16 * 16 + 16)
    assert exits == {"V1": 2 * cnn, "AV1": 2 * slvit, "final": 2 * cells * 4}


def test_one_branch_at_one_place(paper):
    table = cost("audiocsrnet", branch="slvit", layer="av1")
    assert table.exits == (paper.exits[3],)
    assert table.backbone_flops == paper.backbone_flops


def test_another_size(paper):
    table = cost("audiocsrnet", size="512x576")
    assert table.size == "512x576"
    assert table.exits[0].total_flops / paper.exits[0].total_flops == pytest.approx(0.5, rel=0.001)


def test_an_exit_with_options_of_its_own(tmp_path):
    exit = zoo.ExitSpec("V0", "V0", "density", {"density_context": [8, 8]})
    spec = zoo.Spec("audiocsrnet-lite", (exit,))
    zoo.save(zoo.build(spec), spec, tmp_path / "model.safetensors")
    [own] = cost(tmp_path, layer="V0").exits
    [plain] = cost_of(zoo.Spec("audiocsrnet-lite", (zoo.ExitSpec("V0", "V0", "density"),)), "plain").exits
    cells = 1024 * 768 // 64
    added = cells // 4 * 9 * 40 * 8 + cells // 16 * (9 * 8 * 8 + 8 * 81)
    assert own.total_macs - plain.total_macs == added
    assert own.branch_params > plain.branch_params


def test_checkpoint_with_changes(tmp_path):
    from crowdexit.models import zoo

    spec = zoo.Spec("audiocsrnet-s", (), {"size": [128, 64], "width": 1 / 16, "audio_width": 1 / 16})
    zoo.save(zoo.build(spec), spec, tmp_path / "model.safetensors")
    table = cost(tmp_path)
    assert table.size == "128x64"
    assert table.backbone_flops < 1e9


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"model": "nothing"}, "neither a model's name"),
        ({"branch": "vit"}, "no branch kind 'vit'"),
        ({"layer": "V2"}, "no exit location 'V2'"),
        ({"size": "1024"}, "like 1024x576"),
        ({"size": "-64x64"}, "like 1024x576"),
        ({"size": "1000x576"}, "multiples of 64"),
        ({"size": "0x64"}, "multiples of 64"),
        ({"size": "64000x64"}, "16384 at most"),
    ],
)
def test_one_clear_line(asked, says):
    with pytest.raises(CrowdExitError) as error:
        cost(asked.pop("model", "audiocsrnet"), **asked)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


# Multi-exit ViT paper, a branch after layer 6 of TransCrowd: multiply-adds in 10⁹.
LAYER_6 = {
    "mlp": 28.04,
    "cnn-ignore": 28.10,
    "cnn-add": 28.10,
    "cnn-project": 28.16,
    "vit": 32.65,
    "mixer": 31.11,
    "resmlp": 31.02,
}


def test_multiply_adds_of_the_multi_exit_paper():
    """Within 0.5 %: attention's own products are counted, normalisation and activations are not."""
    table = cost("transcrowd-token")
    assert {e.exit for e in table.exits} == {str(layer) for layer in range(1, 12)}
    at_six = {e.kind: e.total_macs / 1e9 for e in table.exits if e.exit == "6"}
    for kind, printed in LAYER_6.items():
        assert at_six[kind] == pytest.approx(printed, rel=0.005), kind
    by_layer = [e.total_macs for e in table.exits if e.kind == "mlp"]
    tokens, dim = 577, 768
    encoder = 12 * dim**2 * tokens + 2 * tokens**2 * dim
    assert [b - a for a, b in itertools.pairwise(by_layer)] == [encoder] * 10
    assert by_layer[0] == 576 * 768 * dim + encoder + 768 * 256 + 256 * 256 + 256


def test_other_sizes_of_a_transformer():
    narrow = cost("transcrowd-token", branch="mlp", layer="1", size="192x96")
    tokens, dim = 12 * 6 + 1, 768
    wanted = 72 * 768 * dim + 12 * dim**2 * tokens + 2 * tokens**2 * dim + 768 * 256 + 256 * 256 + 256
    assert narrow.exits[0].total_macs == wanted
    assert narrow.size == "192x96"
