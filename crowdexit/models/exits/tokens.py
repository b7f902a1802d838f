"""Early exits on a transformer's tokens (multi-exit ViT paper, III-B), each one layer and the MLP head.

P is B×(1+N)×D: the classification token first, then the N patches of a square or oblong grid. Gated MLPs,
Fourier mixing and Perceiver are those that the paper's outlook names as untried.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.exits.head import Branch, MLPHead
from crowdexit.models.exits.registry import ExitLocation, register_exit
from crowdexit.models.stages import Features

EPSILON = 1e-6  # of every layer normalisation, as in ViT
_Norm = partial(nn.LayerNorm, eps=EPSILON)


def encoder_layer(dim: int, heads: int) -> nn.Module:
    """timm's encoder layer of ViT: pre-norm, with biases, an MLP four times as wide."""
    # timm takes as long to import as PyTorch; the networks that count by default have no tokens.
    from timm.models.vision_transformer import Block

    return Block(dim, heads, qkv_bias=True, norm_layer=cast(Any, _Norm))


def attend(block: nn.Module, tokens: Tensor) -> Tensor:
    """An encoder layer over tokens B×N×D.

    On processors its products are written out, which is faster than the fused kernel there, backwards above all.
    """
    cast(Any, block.attn).fused_attn = tokens.is_cuda
    out: Tensor = block(tokens)
    return out


class _Token(Branch):
    """A branch whose head sees one token that stands for the whole image."""

    cells = 1

    def __init__(self, dim: int, outputs: int, hidden: int, dropout: float, scale: float) -> None:
        super().__init__()
        self.dim, self.scale = dim, scale
        self.head = MLPHead(dim, outputs, hidden, dropout)


class MLPTokenExit(_Token):
    """MLP-EE: normalisation, and the head on the classification token alone."""

    kind = "mlp"

    def __init__(
        self, dim: int, outputs: int = 1, *, hidden: int = 256, dropout: float = 0.5, scale: float = 1.0
    ) -> None:
        super().__init__(dim, outputs, hidden, dropout, scale)
        self.norm = _Norm(dim)

    def tokens(self, features: Features) -> Tensor:
        token: Tensor = self.norm(features.tokens()[:, :1])
        return token


class CNNTokenExit(Branch):
    """CNN-EE: the patches as a grid, a 3×3 convolution, ReLU, max pooling 2×2, head.

    Args:
        dim: D of the tokens.
        grid: (rows, columns) of the patches.
        join: what becomes of the classification token p₀: ``ignore`` leaves it out, ``add`` adds it to every
            patch, ``project`` sets it beside every patch, and the convolution brings both back together.
        filters: of the convolution (16: from the table of multiply-adds).
    """

    rectifies = True

    def __init__(
        self,
        dim: int,
        grid: tuple[int, int],
        outputs: int = 1,
        *,
        join: Literal["ignore", "add", "project"] = "ignore",
        filters: int = 16,
        hidden: int = 256,
        dropout: float = 0.5,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.kind, self.join, self.scale = f"cnn-{join}", join, scale
        self.conv = nn.Conv2d(dim * (2 if join == "project" else 1), filters, 3, padding=1)
        self.token_grid = (grid[0] // 2, grid[1] // 2)
        self.dim, self.cells = filters, self.token_grid[0] * self.token_grid[1]
        self.head = MLPHead(filters * self.cells, outputs, hidden, dropout)

    @property
    def input_conv(self) -> nn.Conv2d:
        return self.conv

    def input_map(self, features: Features) -> Tensor:
        """The patches as a map, joined with the classification token: B×D×rows×columns, or twice as deep."""
        patches = features.grid()
        first = features.tokens()[:, 0, :, None, None]
        if self.join == "add":
            patches = patches + first
        elif self.join == "project":
            patches = torch.cat([patches, first.expand_as(patches)], dim=1)
        return patches

    def tokens(self, features: Features) -> Tensor:
        return F.max_pool2d(F.relu(self.conv(self.input_map(features))), 2).flatten(2).transpose(1, 2)


class ViTExit(_Token):
    """ViT-EE: one encoder layer like the backbone's, normalisation, head on the classification token."""

    kind = "vit"

    def __init__(
        self, dim: int, heads: int, outputs: int = 1, *, hidden: int = 256, dropout: float = 0.5, scale: float = 1.0
    ) -> None:
        super().__init__(dim, outputs, hidden, dropout, scale)
        self.encoder = encoder_layer(dim, heads)
        self.norm = _Norm(dim)

    def tokens(self, features: Features) -> Tensor:
        token: Tensor = self.norm(attend(self.encoder, features.tokens())[:, :1])
        return token


class MixingExit(_Token):
    """One layer that mixes all tokens, average over the tokens, head.

    Before the average gMLP and FNet are normalised; the paper's two are not.

    ==========  ====================================================================================
    ``mixer``   MLP-Mixer-EE, equations (3a, 3b): token MLP of D/2, channel MLP of 4D
    ``resmlp``  ResMLP-EE, equations (4a–4c): a linear layer over tokens, affines for normalisation
    ``gmlp``    gMLP-EE: a gated MLP of 4D whose gate is a linear layer over tokens
    ``fnet``    FNet-EE: the real part of a Fourier transform over tokens and channels, channel MLP
    ==========  ====================================================================================

    Args:
        dim: D. length: number of tokens, 1+N.
        shift: of ResMLP, see :class:`ResMLPBlock`.
    """

    def __init__(
        self,
        kind: Literal["mixer", "resmlp", "gmlp", "fnet"],
        dim: int,
        length: int,
        outputs: int = 1,
        *,
        shift: bool = True,
        hidden: int = 256,
        dropout: float = 0.5,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dim, outputs, hidden, dropout, scale)
        self.kind = kind
        self.mix: nn.Module
        if kind == "fnet":
            self.mix = FourierBlock(dim)
        elif kind == "resmlp":
            self.mix = ResMLPBlock(dim, length, shift)
        else:
            from timm.models.mlp_mixer import MixerBlock, SpatialGatingBlock

            self.mix = {"mixer": MixerBlock, "gmlp": SpatialGatingBlock}[kind](dim, length)
        self.norm: nn.Module = nn.Identity() if kind in ("mixer", "resmlp") else _Norm(dim)

    def tokens(self, features: Features) -> Tensor:
        mixed: Tensor = self.norm(self.mix(features.tokens()))
        return mixed.mean(1, keepdim=True)


class ResMLPBlock(nn.Module):
    """ResMLP's layer (arXiv 2105.03404): timm's, and the β of the affine behind its linear layer over tokens.

    Of that affine timm has α alone, its layer scale. The affine behind the channel MLP has no β of its own here
    either: the bias of the MLP's last layer is one.

    Args:
        dim: D. length: number of tokens.
        shift: whether there is that β (equation 4a); False deviates from the paper.
    """

    def __init__(self, dim: int, length: int, shift: bool = True) -> None:
        super().__init__()
        from timm.models.mlp_mixer import ResBlock

        block = ResBlock(dim, length)
        self.norm1, self.linear_tokens, self.ls1 = block.norm1, block.linear_tokens, block.ls1
        self.norm2, self.mlp_channels, self.ls2 = block.norm2, block.mlp_channels, block.ls2
        self.beta = nn.Parameter(torch.zeros(dim)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.ls1 * self.linear_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        if self.beta is not None:
            mixed = mixed + self.beta
        x = x + mixed
        out: Tensor = x + self.ls2 * self.mlp_channels(self.norm2(x))
        return out


class FourierBlock(nn.Module):
    """FNet's layer (Lee-Thorp et al., arXiv 2105.03824): normalisation after each of the two residuals."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        from timm.layers import Mlp

        self.norm1 = _Norm(dim)
        self.norm2 = _Norm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        # No Fourier transform knows bfloat16. Orthonormal, so that the sum keeps the scale of its parts.
        mixed = torch.fft.fft2(x.float(), norm="ortho").real.to(x.dtype)
        x = self.norm1(x + mixed)
        out: Tensor = self.norm2(x + self.mlp(x))
        return out


class PerceiverExit(_Token):
    """Perceiver-EE (Jaegle et al., arXiv 2103.03206): a few learned latents ask all the tokens once.

    Cross-attention of L latents over the tokens, an MLP, one self-attention layer among the latents; their mean
    goes to the head. The cost grows with L·N, not with N².
    """

    kind = "perceiver"

    def __init__(
        self,
        dim: int,
        heads: int,
        outputs: int = 1,
        *,
        latents: int = 16,
        hidden: int = 256,
        dropout: float = 0.5,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dim, outputs, hidden, dropout, scale)
        from timm.layers import Mlp

        self.heads = heads
        self.latents = nn.Parameter(torch.empty(1, latents, dim))
        nn.init.trunc_normal_(self.latents, std=0.02)
        self.norm_tokens = _Norm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm_mlp = _Norm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        self.among = encoder_layer(dim, heads)
        self.norm = _Norm(dim)

    def tokens(self, features: Features) -> Tensor:
        x = self.norm_tokens(features.tokens())
        latents = self.latents.expand(x.shape[0], -1, -1)
        q = self.query(latents).unflatten(2, (self.heads, -1)).transpose(1, 2)  # B×h×L×D/h
        k, v = self.key_value(x).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)  # B×h×(1+N)×D/h each
        asked = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        latents = latents + self.proj(asked)
        latents = latents + self.mlp(self.norm_mlp(latents))
        out: Tensor = self.norm(self.among(latents))
        return out.mean(1, keepdim=True)


_HEAD = ("hidden", "dropout", "scale")


@register_exit("mlp", reads=("tokens",))
def _mlp(at: ExitLocation) -> MLPTokenExit:
    return MLPTokenExit(at.channels, at.outputs, **at.settings_for(*_HEAD))


def _cnn(at: ExitLocation, join: Literal["ignore", "add", "project"]) -> CNNTokenExit:
    return CNNTokenExit(at.channels, at.grid, at.outputs, join=join, **at.settings_for("filters", *_HEAD))


register_exit("cnn-ignore", reads=("tokens",))(partial(_cnn, join="ignore"))
register_exit("cnn-add", reads=("tokens",))(partial(_cnn, join="add"))
register_exit("cnn-project", reads=("tokens",))(partial(_cnn, join="project"))


@register_exit("vit", reads=("tokens",))
def _vit(at: ExitLocation) -> ViTExit:
    return ViTExit(at.channels, at.heads, at.outputs, **at.settings_for(*_HEAD))


def _mixing(at: ExitLocation, mixing: Literal["mixer", "resmlp", "gmlp", "fnet"]) -> MixingExit:
    count = 1 + at.grid[0] * at.grid[1]
    return MixingExit(mixing, at.channels, count, at.outputs, **at.settings_for("shift", *_HEAD))


register_exit("mixer", reads=("tokens",))(partial(_mixing, mixing="mixer"))
register_exit("resmlp", reads=("tokens",))(partial(_mixing, mixing="resmlp"))
register_exit("gmlp", reads=("tokens",))(partial(_mixing, mixing="gmlp"))
register_exit("fnet", reads=("tokens",))(partial(_mixing, mixing="fnet"))


@register_exit("perceiver", reads=("tokens",))
def _perceiver(at: ExitLocation) -> PerceiverExit:
    return PerceiverExit(at.channels, at.heads, at.outputs, **at.settings_for("latents", *_HEAD))
