"""Early exits on feature maps: the CNN baseline and SL-ViT, each also with audio (SL-ViT paper, figures 5, 6)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.exits.head import Branch, MLPHead
from crowdexit.models.exits.registry import ExitLocation, register_exit
from crowdexit.models.stages import Features


class GammaBeta(nn.Module):
    """γ and β of equation (3) (Hu et al.): the audio scales and shifts each channel of a map.

    Starts as the identity (γ = 1, β = 0) plus what little the fresh weights add.
    """

    def __init__(self, audio: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(audio, 2 * channels)
        nn.init.normal_(self.linear.weight, std=0.01)
        with torch.no_grad():
            self.linear.bias[:channels] = 1.0
            self.linear.bias[channels:] = 0.0

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        gamma, beta = self.linear(audio).to(visual.dtype)[:, :, None, None].chunk(2, dim=1)  # B×C×1×1 each
        return torch.addcmul(beta, gamma, visual)


class CNNExit(Branch):
    """The baseline branch: 3×3 convolution of 16 filters, ReLU, max pooling, flatten, MLP head.

    With audio (AV1) batch normalisation, γ and β come before the ReLU, as in AudioCSRNet's fusion blocks.

    Args:
        channels: C of the map.
        size: (height, width) of the map.
        outputs: classes, or 1 for a count.
        filters: of the convolution (16: from the parameter tables).
        pool: of the max pooling: 2 on the classifiers, 4 on AudioCSRNet.
        padding: 1 keeps the size (AudioCSRNet), 0 does not (classifiers).
        audio: length of the audio's vector to fuse with γ and β (AV1), or 0.
        norm: with audio, batch normalisation before γ and β; False deviates from the paper.
        scale: the answer is the head's output times this; 100 keeps a count's weights near one.
    """

    kind = "cnn"
    rectifies = True

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        outputs: int = 1,
        *,
        filters: int = 16,
        pool: int = 4,
        padding: int = 1,
        audio: int = 0,
        norm: bool = True,
        hidden: int = 256,
        dropout: float = 0.5,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        normalises = norm and audio > 0
        self.conv = nn.Conv2d(channels, filters, 3, padding=padding, bias=not normalises)
        self.norm = nn.BatchNorm2d(filters) if normalises else None
        self.uses_audio = audio > 0
        self.fuse = GammaBeta(audio, filters) if audio else None
        self.pool = nn.MaxPool2d(pool)
        shrink = 2 - 2 * padding
        self.token_grid = ((size[0] - shrink) // pool, (size[1] - shrink) // pool)
        self.dim = filters
        self.cells = self.token_grid[0] * self.token_grid[1]
        self.head = MLPHead(filters * self.cells, outputs, hidden, dropout)

    @property
    def count_head(self) -> nn.Sequential | None:
        # With batch normalisation a batch's statistics would undo what is fitted before it.
        return super().count_head if self.norm is None else None

    @property
    def input_conv(self) -> nn.Conv2d:
        return self.conv

    def tokens(self, features: Features) -> Tensor:
        """What the head sees of each pooled cell, B×N×filters; position-major, as in SL-ViT."""
        y = self.conv(self.input_map(features))
        if self.norm is not None:
            y = self.norm(y)
        if self.fuse is not None:
            assert features.audio is not None
            y = self.fuse(y, features.audio)
        out: Tensor = self.pool(F.relu(y)).flatten(2).transpose(1, 2)
        return out


class WideAttention(nn.Module):
    """Multi-head self-attention whose heads are each as wide as the token.

    The paper's key size equals d, so the projections go d → h·d, three of them, and h·d → d, all with bias
    (from the parameter tables). With d = 32 and 12 heads that is far wider than usual attention.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * heads * dim)
        self.proj = nn.Linear(heads * dim, dim)

    def weights(self, x: Tensor) -> Tensor:
        """How much each token (third dimension) attends to each (fourth): B×h×N×N, its rows' sums one."""
        q, k, _ = self._asked(x)
        out: Tensor = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return out

    def _asked(self, x: Tensor) -> Tensor:
        """Queries, keys and values: 3×B×h×N×d."""
        split: Tensor = self.qkv(x).unflatten(2, (3, self.heads, x.shape[2])).permute(2, 0, 3, 1, 4)
        return split

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._asked(x)
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """One pre-norm transformer encoder: attention, then MLP d → 2d → d, both with a residual connection.

    The second residual connection can be switched off (SL-ViT paper, III).
    """

    def __init__(self, dim: int, heads: int, second_residual: bool = True) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WideAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.second_residual = second_residual

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.mlp(self.norm2(x))
        out: Tensor = x + y if self.second_residual else y
        return out


class SLViTExit(Branch):
    """Single-layer vision transformer: patches p×p of the map, one encoder, all tokens flattened into the head.

    With audio (AV1), the audio vector is one more patch: tiled over p×p so that the *same* projection takes
    it, with a positional embedding of its own. The audio vector must be as long as the map is deep; where it
    is not (narrow models), ``audio`` differs from ``channels`` and a linear layer first brings it there.

    Args:
        channels: C of the map.
        size: (height, width) of the map, both divisible by ``patch``.
        outputs: classes, or 1 for a count.
        patch: p. dim: d. heads: h.
        audio: length of the audio's vector (AV1), or 0.
        scale: the answer is the head's output times this; 100 keeps a count's weights near one.

    Raises:
        ValueError: if the patch size does not divide the map.
    """

    kind = "slvit"

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        outputs: int = 1,
        *,
        patch: int = 8,
        dim: int = 32,
        heads: int = 12,
        audio: int = 0,
        second_residual: bool = True,
        hidden: int = 256,
        dropout: float = 0.5,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        if size[0] % patch or size[1] % patch:
            raise ValueError(f"a patch of {patch} does not divide a map of {size[0]}×{size[1]}")
        self.project = nn.Conv2d(channels, dim, patch, stride=patch)
        self.uses_audio = audio > 0
        self.audio_to_map = nn.Linear(audio, channels) if audio not in (0, channels) else nn.Identity()
        self.token_grid = (size[0] // patch, size[1] // patch)
        self.dim = dim
        self.cells = self.token_grid[0] * self.token_grid[1] + self.uses_audio
        self.position = nn.Parameter(torch.empty(1, self.cells, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.encoder = EncoderLayer(dim, heads, second_residual)
        self.head = MLPHead(self.cells * dim, outputs, hidden, dropout)

    @property
    def input_conv(self) -> nn.Conv2d:
        return self.project

    def embed(self, features: Features) -> Tensor:
        """The sequence before the encoder, B×N×d; the audio patch last."""
        visual = self.project(self.input_map(features)).flatten(2).transpose(1, 2)  # B×N×d
        if not self.uses_audio:
            out: Tensor = visual + self.position
            return out
        assert features.audio is not None
        # The projection of a vector tiled over p×p is its product with the kernel summed over p×p.
        kernel = self.project.weight.sum((2, 3))
        audio = F.linear(self.audio_to_map(features.audio), kernel.to(visual.dtype), self.project.bias)
        return torch.cat([visual, audio.unsqueeze(1).to(visual.dtype)], dim=1) + self.position

    def attention_map(self, features: Features) -> Tensor:
        """The mean over heads and asking patches of the attention weights, by asked patch; the audio's is left out."""
        weights = self.encoder.attention.weights(self.encoder.norm1(self.embed(features)))  # B×h×N×N
        rows, columns = self.token_grid or (1, 1)
        asked = weights.mean((1, 2))[:, : rows * columns]
        out: Tensor = (asked / asked.sum(1, keepdim=True)).unflatten(1, (rows, columns))
        return out

    def tokens(self, features: Features) -> Tensor:
        """What the head sees, B×N×d: the encoded patches in reading order, the audio patch last."""
        encoded: Tensor = self.encoder(self.embed(features))
        return encoded


def patch_size(height: int, width: int) -> int:
    """The paper's rule: the divisor of the map's height and width that is nearest to their square root."""
    common = math.gcd(height, width)
    target = math.sqrt(math.sqrt(height * width))
    return min((p for p in range(1, common + 1) if common % p == 0), key=lambda p: (abs(p - target), p))


@register_exit("cnn", reads=("map",))
def _cnn(at: ExitLocation) -> CNNExit:
    shape = at.settings_for("filters", "pool", "padding", "norm", "hidden", "dropout", "scale")
    return CNNExit(at.channels, at.grid, at.outputs, audio=at.fused_audio, **shape)


@register_exit("slvit", reads=("map", "tokens"))
def _slvit(at: ExitLocation) -> SLViTExit:
    return _slvit_with(at, at.fused_audio)


@register_exit("slvit-audio", reads=("tokens",), adds_audio=True)
def _slvit_audio(at: ExitLocation) -> SLViTExit:
    return _slvit_with(at, at.audio)


def _slvit_with(at: ExitLocation, audio: int) -> SLViTExit:
    patch = at.settings["patch"] if "patch" in at.settings else patch_size(*at.grid)
    shape = at.settings_for("dim", "heads", "second_residual", "hidden", "dropout", "scale")
    return SLViTExit(at.channels, at.grid, at.outputs, patch=patch, audio=audio, **shape)
