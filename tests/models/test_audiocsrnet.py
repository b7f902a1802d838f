"""AudioCSRNet's blocks against their formulas, and what its answers may and may not depend on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from crowdexit.models.backbones.audiocsrnet import (
    AudioCSRNet,
    AudioCSRNetConfig,
    DensityExit,
    FusionBlock,
    upsample_sum,
)
from crowdexit.models.stages import Features, inputs

SMALL = {"size": (128, 64), "width": 1 / 16, "audio_width": 1 / 16, "dim": 4, "heads": 2, "filters": 4, "hidden": 16}
PLACES = ("V1", "AV1", "AV2")


def make(**changes) -> AudioCSRNet:
    """A small network with all branches whose every part says something (no zeros, no ones)."""
    torch.manual_seed(0)
    network = AudioCSRNet(AudioCSRNetConfig(**{**SMALL, **changes}))
    for place in PLACES:
        network.add_branch(place, place, "slvit")
        network.add_branch(f"{place}-cnn", place, "cnn")
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.dim() == 1 and tensor.is_floating_point() and not name.endswith("norm.weight"):
            tensor.add_(0.1 * torch.randn_like(tensor))
    return network.eval()


def make_features(batch=3) -> Features:
    torch.manual_seed(1)
    has_audio = torch.tensor([True, False, True])[:batch]
    valid_mask = torch.rand(batch, 1, 8, 16)
    return inputs(torch.randn(batch, 3, 64, 128), torch.randn(batch, 1, 96, 64), has_audio, valid_mask)


@pytest.mark.parametrize("front_norm", [False, True])
def test_shapes_and_gradients(front_norm):
    network = make(front_norm=front_norm)
    answers = network(make_features())
    assert list(answers) == ["V1", "V1-cnn", "AV1", "AV1-cnn", "AV2", "AV2-cnn", "final"]
    assert all(a.value.shape == (3,) for a in answers.values())
    assert answers["final"].density.shape == (3, 1, 8, 16)
    assert all(a.density is None for name, a in answers.items() if name != "final")
    torch.stack([a.value.square().mean() for a in answers.values()]).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("norm", [True, False])
def test_batch_norm_stands_where_the_cnn_branch_fuses_audio(norm):
    branches = make(cnn_norm=norm).branches
    assert {name: branches[name].norm is not None for name in ("V1-cnn", "AV1-cnn", "AV2-cnn")} == {
        "V1-cnn": False,
        "AV1-cnn": norm,
        "AV2-cnn": False,
    }


def test_paper_size_map_and_vector():
    with torch.device("meta"):
        network = AudioCSRNet()
        features = inputs(torch.empty(1, 3, 576, 1024), torch.empty(1, 1, 96, 64))
        for stage in network.stages[:2]:
            features = stage(features)
        assert features.visual.shape == (1, 512, 72, 128)
        assert features.audio.shape == (1, 512)
        assert network.stages[1].layers(features.log_mel).shape == (1, 512, 6, 4)
        assert network.stages[2](features).visual.shape == (1, 512, 72, 128)
        assert network.stages[3](network.stages[2](features)).visual.shape == (1, 64, 72, 128)


def test_fusion_block_is_equation_3():
    torch.manual_seed(0)
    block = FusionBlock(4, 3, 5).eval()
    for tensor in (block.norm.weight, block.norm.bias, block.norm.running_mean, *block.fuse.parameters()):
        torch.nn.init.normal_(tensor)
    block.norm.running_var.uniform_(0.5, 2)
    v, a = torch.randn(2, 4, 6, 7), torch.randn(2, 5)
    out = block(v, a)
    assert out.shape == (2, 3, 6, 7)
    padded = F.pad(v, (2, 2, 2, 2))
    gamma, beta = (a @ block.fuse.linear.weight.T + block.fuse.linear.bias).split(3, dim=1)
    for b in range(2):
        for c in range(3):
            dilated = torch.zeros(6, 7)
            for i in range(3):
                for j in range(3):
                    taps = padded[b, :, 2 * i : 2 * i + 6, 2 * j : 2 * j + 7]
                    dilated += (block.conv.weight[c, :, i, j, None, None] * taps).sum(0)
            spread = (block.norm.running_var[c] + block.norm.eps).sqrt()
            normal = (dilated - block.norm.running_mean[c]) / spread * block.norm.weight[c] + block.norm.bias[c]
            expected = torch.relu(gamma[b, c] * normal + beta[b, c])
            torch.testing.assert_close(out[b, c], expected, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([1, 2, 3, 8]), st.integers(0, 2**31))
@settings(max_examples=40, deadline=None)
def test_upsampling_keeps_the_weight_of_every_cell(height, width, factor, seed):
    """One cell at a time, so that the cells on the border are held to it as well."""
    cells = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    cells *= torch.rand(len(cells), 1, 1, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    full = upsample_sum(cells, factor)
    assert full.shape == (height * width, 1, factor * height, factor * width)
    torch.testing.assert_close(full.sum((1, 2, 3)), cells.sum((1, 2, 3)))


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_regressor_starts_as_the_sum(activation):
    config = AudioCSRNetConfig(size=(128, 64), density_activation=activation, density_scale=7.0)
    torch.manual_seed(0)
    plain = DensityExit(5, config)
    features = make_features(2).with_visual(torch.randn(2, 5, 8, 16))
    before = plain(features)
    plain.start_regressor((128, 64))
    after = plain(features)
    torch.testing.assert_close(after.value, before.value, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after.density, before.density)
    with torch.no_grad():
        plain.regressor.weight.mul_(2)
    torch.testing.assert_close(plain(features).value, 2 * before.value, rtol=1e-5, atol=1e-5)
    assert DensityExit(5, AudioCSRNetConfig(size=(128, 64), regressor=True)).regressor.weight.shape == (1, 128 * 64)


def test_count_is_the_sum_of_the_density_and_scaled():
    features = make_features(2)
    answers = [make(density_scale=scale)(features)["final"] for scale in (1.0, 50.0)]
    torch.testing.assert_close(answers[0].value, answers[0].density.sum((1, 2, 3)))
    torch.testing.assert_close(answers[1].value * 50, answers[0].value, rtol=1e-5, atol=1e-5)


def test_rectified_density_is_never_negative():
    plain, rectified = (make(density_activation=a) for a in ("none", "relu"))
    rectified.load_state_dict(plain.state_dict())
    for network in (plain, rectified):
        network.final.conv.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    signed = plain(make_features())["final"].density
    assert signed.min() < 0
    torch.testing.assert_close(rectified(make_features())["final"].density, signed.clamp_min(0))


@pytest.mark.parametrize("regressor", [False, True])
def test_padding_counts_out(regressor):
    network = make(regressor=regressor)
    whole = replace(make_features(), valid_mask=torch.ones(3, 1, 8, 16))
    full = network(whole)["final"].density
    valid_mask = torch.ones_like(whole.valid_mask)
    valid_mask[..., 10:] = 0
    valid_mask[..., 9] = 0.25
    answer = network(replace(whole, valid_mask=valid_mask))["final"]
    expected = full[..., :9].sum((1, 2, 3)) + 0.25 * full[..., 9].sum((1, 2))
    torch.testing.assert_close(answer.value, expected, rtol=1e-4, atol=1e-5)
    assert not answer.density[..., 10:].any()


def test_rows_without_audio_ignore_log_mel_and_audio_weights():
    network = make()
    features = make_features()
    garbage = features.log_mel.clone()
    garbage[1] = float("nan")
    other = replace(features, log_mel=garbage)
    for name, answer in network(features).items():
        assert torch.equal(answer.value, network(other)[name].value), name
        assert torch.isfinite(answer.value).all(), name
    vggish = network.stages[1]
    with torch.no_grad():
        vggish.unheard.normal_()
    assert not vggish(features).audio[1].any()
    has_audio = vggish.embed(features.log_mel[[0, 2]]) - vggish.unheard
    torch.testing.assert_close(vggish(features).audio[[0, 2]], has_audio)
    moved = network(features)
    before = make()(features)
    for name in ("AV1", "AV1-cnn", "AV2", "final"):
        assert moved[name].value[1] == before[name].value[1], name
        assert moved[name].value[0] != before[name].value[0], name
    assert torch.equal(moved["V1"].value, before["V1"].value)


def test_v1_ignores_audio_and_the_others_use_it():
    network = make()
    features = make_features()
    louder = replace(features, log_mel=features.log_mel + 1)
    quiet, loud = network(features), network(louder)
    for name in quiet:
        same = torch.equal(quiet[name].value, loud[name].value)
        assert same == name.startswith("V1"), name


@pytest.mark.parametrize("front_norm", [False, True])
def test_answers_do_not_depend_on_the_batch(front_norm):
    network = make(front_norm=front_norm)
    features = make_features()
    together = network(features)
    for i in range(3):
        for name, answer in network(features.select(torch.tensor([i]))).items():
            torch.testing.assert_close(answer.value[0], together[name].value[i], rtol=1e-4, atol=1e-5)


def test_compaction_between_stages_changes_no_answer():
    network = make()
    features = make_features()
    together = network(features)
    staying = torch.tensor([True, False, True])
    features = network.stages[1](network.stages[0](features)).select(staying)
    features = network.stages[2](features)
    torch.testing.assert_close(network.branches["AV2"](features).value, together["AV2"].value[staying])
    last = network.stages[3](features.select(torch.tensor([1])))
    final = network.final(last)
    torch.testing.assert_close(final.value, together["final"].value[[2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(final.density, together["final"].density[[2]], rtol=1e-4, atol=1e-6)


def test_places_and_kinds_are_checked():
    network = AudioCSRNet(AudioCSRNetConfig(**SMALL))
    with pytest.raises(ValueError, match="no exit location 'V2'"):
        network.add_branch("x", "V2", "cnn")
    with pytest.raises(ValueError, match="no branch of kind 'vit'"):
        network.add_branch("x", "V1", "vit")


def test_config_is_plain_data():
    config = AudioCSRNetConfig(**SMALL)
    assert config.grid == (8, 16)
    assert AudioCSRNetConfig(**config.to_dict()) == config
