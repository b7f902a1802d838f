"""The branches on tokens against their formulas written out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from crowdexit.models.exits import CNNTokenExit, MixingExit, MLPTokenExit, PerceiverExit, ViTExit
from crowdexit.models.stages import Features

DIM, GRID = 12, (4, 6)
LENGTH = 1 + GRID[0] * GRID[1]
SMALL = {"hidden": 8, "scale": 10.0}

EXITS = {
    "mlp": lambda k: MLPTokenExit(DIM, k, **SMALL),
    "cnn-ignore": lambda k: CNNTokenExit(DIM, GRID, k, join="ignore", filters=4, **SMALL),
    "cnn-add": lambda k: CNNTokenExit(DIM, GRID, k, join="add", filters=4, **SMALL),
    "cnn-project": lambda k: CNNTokenExit(DIM, GRID, k, join="project", filters=4, **SMALL),
    "vit": lambda k: ViTExit(DIM, 3, k, **SMALL),
    "mixer": lambda k: MixingExit("mixer", DIM, LENGTH, k, **SMALL),
    "resmlp": lambda k: MixingExit("resmlp", DIM, LENGTH, k, **SMALL),
    "gmlp": lambda k: MixingExit("gmlp", DIM, LENGTH, k, **SMALL),
    "fnet": lambda k: MixingExit("fnet", DIM, LENGTH, k, **SMALL),
    "perceiver": lambda k: PerceiverExit(DIM, 3, k, latents=5, **SMALL),
}


def record(batch: int = 2) -> Features:
    torch.manual_seed(0)
    tokens = torch.randn(batch, LENGTH, DIM)
    has_audio = torch.zeros(batch, dtype=torch.bool)
    return Features(tokens, torch.zeros(batch, 1, 96, 64), has_audio, torch.ones(batch, 1, 8, 12), None, GRID)


def made(kind: str, outputs: int = 1):
    torch.manual_seed(1)
    return EXITS[kind](outputs).eval()


@pytest.mark.parametrize("kind", EXITS)
@pytest.mark.parametrize("outputs", [1, 10])
def test_shapes_and_gradients(kind, outputs):
    features = record()
    features.visual.requires_grad_()
    branch = made(kind, outputs)
    assert branch.kind == kind
    answer = branch(features)
    assert answer.value.shape == ((2,) if outputs == 1 else (2, 10))
    assert answer.value.dtype == torch.float32
    tokens = branch.tokens(features)
    assert tokens.shape == (2, branch.cells, branch.dim)
    answer.value.square().sum().backward()
    assert features.visual.grad.abs().sum() > 0
    for name, parameter in branch.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", EXITS)
def test_tokens_it_reads(kind):
    """The classification token alone, the patches alone, or both."""
    features, branch = record(), made(kind)
    before = branch(features).value
    first, patch = features.visual.clone(), features.visual.clone()
    first[:, 0] += torch.randn(DIM)
    patch[:, 8] += 10 * torch.randn(DIM)
    input_map_first = not torch.equal(branch(features.with_visual(first)).value, before)
    input_map_patches = not torch.equal(branch(features.with_visual(patch)).value, before)
    assert (input_map_first, input_map_patches) == (kind != "cnn-ignore", kind != "mlp")


@pytest.mark.parametrize("kind", EXITS)
def test_a_sample_does_not_depend_on_its_batch(kind):
    features, branch = record(5), made(kind)
    alone = torch.cat([branch(features.select(torch.tensor([i]))).value for i in range(5)])
    torch.testing.assert_close(branch(features).value, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", EXITS)
def test_bfloat16_is_near_float32(kind):
    features, branch = record(), made(kind)
    wanted = branch(features).value
    with torch.autocast("cpu", torch.bfloat16):
        got = branch(features).value
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.1)


def test_cnn_joins():
    features = record()
    p0 = features.visual[:, :1]
    grid = features.visual[:, 1:].transpose(1, 2).unflatten(2, GRID)
    wide = p0.transpose(1, 2).unsqueeze(3)
    joined = {"ignore": grid, "add": grid + wide, "project": torch.cat([grid, wide.expand(-1, -1, *GRID)], 1)}
    for join, patches in joined.items():
        branch = made(f"cnn-{join}")
        pooled = F.max_pool2d(F.relu(branch.conv(patches)), 2)
        wanted = branch.head(pooled.permute(0, 2, 3, 1).flatten(1)).squeeze(1) * 10
        torch.testing.assert_close(branch(features).value, wanted)
        assert branch.token_grid == (2, 3)


def test_mixer_is_equations_3a_and_3b():
    branch, x = made("mixer"), record().visual
    mix = branch.mix
    y = x + mix.mlp_tokens(mix.norm1(x).transpose(1, 2)).transpose(1, 2)
    z = y + mix.mlp_channels(mix.norm2(y))
    torch.testing.assert_close(branch.tokens(record())[:, 0], z.mean(1))  # pooled as it is, nothing normalises it
    assert mix.mlp_tokens.fc1.out_features == DIM // 2
    assert mix.mlp_channels.fc1.out_features == 4 * DIM


@pytest.mark.parametrize("shift", [True, False])
def test_resmlp_is_equations_4a_to_4c(shift):
    torch.manual_seed(1)
    branch, x = MixingExit("resmlp", DIM, LENGTH, shift=shift, **SMALL).eval(), record().visual
    mix = branch.mix
    with torch.no_grad():  # its layer scale starts too small to show anything
        mix.ls1.fill_(0.7)
        mix.ls2.fill_(0.3)
        for name, parameter in mix.named_parameters():
            if "beta" in name:
                parameter.normal_()
    affine1 = x * mix.norm1.alpha + mix.norm1.beta
    y = x + 0.7 * mix.linear_tokens(affine1.transpose(1, 2)).transpose(1, 2) + (mix.beta if shift else 0)
    z = y + 0.3 * mix.mlp_channels(y * mix.norm2.alpha + mix.norm2.beta)
    torch.testing.assert_close(branch.tokens(record())[:, 0], z.mean(1))


def test_fourier_mixing_is_the_discrete_transform():
    branch, x = made("fnet"), record(1).visual
    n, d = torch.arange(LENGTH).double(), torch.arange(DIM).double()
    over_tokens = torch.exp(-2j * torch.pi * n[:, None] * n / LENGTH) / LENGTH**0.5
    over_channels = torch.exp(-2j * torch.pi * d[:, None] * d / DIM) / DIM**0.5
    mixed = (over_tokens @ x[0].to(torch.complex128) @ over_channels).real.float()
    mix = branch.mix
    y = mix.norm1(x[0] + mixed)
    z = mix.norm2(y + mix.mlp(y))
    torch.testing.assert_close(branch.tokens(record(1))[0, 0], branch.norm(z).mean(0), rtol=1e-4, atol=1e-5)


def test_perceiver_asks_like_attention():
    branch, x = made("perceiver"), record().visual
    q = branch.query(branch.latents)
    k, v = branch.key_value(branch.norm_tokens(x)).chunk(2, dim=2)
    heads = [
        torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 2, dim=-1) @ v[..., part]
        for part in (slice(0, 4), slice(4, 8), slice(8, 12))
    ]
    latents = branch.latents + branch.proj(torch.cat(heads, dim=2))
    latents = latents + branch.mlp(branch.norm_mlp(latents))
    wanted = branch.norm(branch.among(latents)).mean(1, keepdim=True)
    torch.testing.assert_close(branch.tokens(record()), wanted)
