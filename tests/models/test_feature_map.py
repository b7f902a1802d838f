"""The branches on feature maps against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from crowdexit.models.exits import CNNExit, GammaBeta, SLViTExit, patch_size
from crowdexit.models.exits.feature_map import EncoderLayer, WideAttention
from crowdexit.models.stages import Features


def record(batch=2, channels=6, height=8, width=16, audio=6) -> Features:
    torch.manual_seed(0)
    visual = torch.randn(batch, channels, height, width)
    vector = torch.randn(batch, audio) if audio else None
    return Features(visual, torch.zeros(batch, 1, 96, 64), torch.ones(batch, dtype=torch.bool), visual[:, :1], vector)


EXITS = {
    "cnn": lambda audio, outputs: CNNExit(6, (8, 16), outputs, filters=4, audio=audio, hidden=64),
    "slvit": lambda audio, outputs: SLViTExit(6, (8, 16), outputs, patch=4, dim=4, heads=3, audio=audio, hidden=64),
}


@pytest.mark.parametrize("kind", EXITS)
@pytest.mark.parametrize("audio", [0, 6, 5])
@pytest.mark.parametrize("outputs", [1, 10])
def test_shapes_and_gradients(kind, audio, outputs):
    features = record(audio=audio)
    features.visual.requires_grad_()
    branch = EXITS[kind](audio, outputs).eval()
    answer = branch(features)
    assert answer.value.shape == ((2,) if outputs == 1 else (2, 10))
    assert answer.density is None
    answer.value.square().sum().backward()
    assert features.visual.grad is not None
    assert features.visual.grad.abs().sum() > 0
    for name, parameter in branch.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", EXITS)
def test_audio_matters_where_it_is_used(kind):
    torch.manual_seed(1)
    branch = EXITS[kind](6, 1).eval()
    features = record()
    other = Features(features.visual, features.log_mel, features.has_audio, features.valid_mask, 5 * torch.randn(2, 6))
    assert not torch.equal(branch(features).value, branch(other).value)
    deaf = EXITS[kind](0, 1).eval()
    assert torch.equal(deaf(features).value, deaf(other).value)


def test_audio_patch_is_the_tiled_vector_projected():
    branch = SLViTExit(6, (8, 16), patch=4, dim=5, heads=2, audio=6, hidden=8)
    features = record()
    tiled = features.audio[:, :, None, None].expand(-1, -1, 4, 4)
    literal = branch.project(tiled).flatten(1)  # B×d: one patch
    sequence = branch.embed(features) - branch.position
    assert sequence.shape == (2, 2 * 4 + 1, 5)
    torch.testing.assert_close(sequence[:, -1], literal, rtol=1e-5, atol=1e-6)
    patch = branch.project(features.visual[:, :, 4:8, 8:12]).flatten(1)  # second row, third column
    torch.testing.assert_close(sequence[:, 1 * 4 + 2], patch, rtol=1e-5, atol=1e-6)


def test_narrow_audio_is_first_brought_to_the_maps_depth():
    branch = SLViTExit(6, (8, 16), patch=4, dim=5, heads=2, audio=3, hidden=8)
    features = record(audio=3)
    tiled = branch.audio_to_map(features.audio)[:, :, None, None].expand(-1, -1, 4, 4)
    literal = branch.project(tiled).flatten(1)
    torch.testing.assert_close((branch.embed(features) - branch.position)[:, -1], literal, rtol=1e-5, atol=1e-6)


def test_patch_must_divide_the_map():
    with pytest.raises(ValueError, match="a patch of 4 does not divide a map of 8×10"):
        SLViTExit(6, (8, 10), patch=4)


def test_wide_attention_by_its_formula():
    torch.manual_seed(0)
    dim, heads, tokens = 4, 3, 5
    attention = WideAttention(dim, heads)
    x = torch.randn(2, tokens, dim)
    assert sum(p.numel() for p in attention.parameters()) == 3 * heads * dim * (dim + 1) + heads * dim * dim + dim
    weight, bias = attention.qkv.weight.view(3, heads, dim, dim), attention.qkv.bias.view(3, heads, dim)
    out = []
    for head in range(heads):
        q, k, v = (x @ weight[i, head].T + bias[i, head] for i in range(3))
        out.append(torch.softmax(q @ k.transpose(1, 2) / dim**0.5, dim=-1) @ v)
    torch.testing.assert_close(attention(x), attention.proj(torch.cat(out, dim=2)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("second", [True, False])
def test_encoder_layer_and_its_second_residual(second):
    layer = EncoderLayer(4, 2, second)
    x = torch.randn(2, 5, 4)
    y = x + layer.attention(layer.norm1(x))
    expected = layer.mlp(layer.norm2(y)) + (y if second else 0)
    torch.testing.assert_close(layer(x), expected)


def test_gamma_beta_starts_as_the_identity():
    fuse = GammaBeta(5, 3)
    visual = torch.randn(2, 3, 4, 4)
    assert torch.equal(fuse(visual, torch.zeros(2, 5)), visual)
    near = fuse(visual, torch.randn(2, 5))
    assert not torch.equal(near, visual)
    torch.testing.assert_close(near, visual, rtol=0.2, atol=0.2)


def test_gamma_beta_by_its_formula():
    fuse = GammaBeta(5, 3)
    torch.nn.init.normal_(fuse.linear.weight)
    torch.nn.init.normal_(fuse.linear.bias)
    visual, audio = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    out = fuse(visual, audio)
    both = audio @ fuse.linear.weight.T + fuse.linear.bias
    for sample in range(2):
        for channel in range(3):
            expected = both[sample, channel] * visual[sample, channel] + both[sample, 3 + channel]
            torch.testing.assert_close(out[sample, channel], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("padding", "cells"), [(1, 2 * 4), (0, 1 * 3)])
def test_cnn_branch_by_its_formula(padding, cells):
    branch = CNNExit(6, (8, 16), 2, filters=4, padding=padding, hidden=8).eval()
    features = record()
    y = F.max_pool2d(F.relu(F.conv2d(features.visual, branch.conv.weight, branch.conv.bias, padding=padding)), 4)
    rows = [y[:, :, r, c] for r in range(y.shape[2]) for c in range(y.shape[3])]  # position-major
    assert len(rows) == branch.cells == cells
    torch.testing.assert_close(branch(features).value, branch.head(torch.cat(rows, dim=1)))


@pytest.mark.parametrize("norm", [True, False])
def test_cnn_branch_with_audio_by_equation_3(norm):
    """ReLU(γ ⊙ BN(D(v)) + β), as in AudioCSRNet's fusion blocks, or without the batch normalisation."""
    torch.manual_seed(0)
    branch = CNNExit(6, (8, 16), 2, filters=4, audio=6, norm=norm, hidden=8).eval()
    for tensor in (*branch.conv.parameters(), *branch.fuse.parameters()):
        torch.nn.init.normal_(tensor)
    features = record()
    y = branch.conv(features.visual)
    if norm:
        assert branch.conv.bias is None
        for tensor in (branch.norm.weight, branch.norm.bias, branch.norm.running_mean):
            torch.nn.init.normal_(tensor)
        branch.norm.running_var.uniform_(0.5, 2)
        y = F.batch_norm(
            y, branch.norm.running_mean, branch.norm.running_var, branch.norm.weight, branch.norm.bias, eps=1e-5
        )
    gamma, beta = (features.audio @ branch.fuse.linear.weight.T + branch.fuse.linear.bias)[..., None, None].split(4, 1)
    expected = F.max_pool2d(F.relu(gamma * y + beta), 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(branch.tokens(features), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [(72, 128, 8), (28, 28, 4), (25, 25, 5), (24, 24, 4), (7, 7, 1), (96, 128, 8), (1, 1, 1), (30, 42, 6)],
)
def test_patch_size(height, width, expected):
    """The first three are the paper's: AudioCSRNet 8, DenseNet201 and ResNet152 4, InceptionV3 5."""
    assert patch_size(height, width) == expected
    assert height % expected == width % expected == 0
