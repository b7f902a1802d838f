"""Fold batch normalisation into the convolution before it, for inference."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from crowdexit.models.backbones.efficientnet import LitePyramid


@torch.no_grad()
def fold_norms(network: nn.Module) -> int:
    """Fold each batch normalisation that directly follows a convolution into its weights, in place.

    A normalisation follows a convolution where its parent registers it right behind one with as many channels
    (:class:`LitePyramid`, which normalises a sum of three, is treated by itself). Modules keep their names; a
    normalisation with an activation leaves that activation in its place.

    Returns:
        How many were folded.
    """
    folded = 0
    for parent in [*network.modules()]:
        if isinstance(parent, LitePyramid):
            folded += _fold_pyramid(parent)
            continue
        before: nn.Module | None = None
        for name, module in [*parent.named_children()]:
            if isinstance(module, _BatchNorm) and isinstance(before, nn.Conv2d) and _fits(before, module):
                scale, shift = _scale_and_shift(module)
                _scale_weights(before, scale)
                bias = shift if before.bias is None else shift + scale * before.bias
                before.bias = nn.Parameter(bias, requires_grad=False)
                setattr(parent, name, getattr(module, "act", nn.Identity()))
                folded += 1
            before = module
    return folded


def _fits(conv: nn.Conv2d, norm: _BatchNorm) -> bool:
    return norm.num_features == conv.out_channels and norm.running_mean is not None


def _fold_pyramid(pyramid: LitePyramid) -> int:
    if not isinstance(pyramid.norm, _BatchNorm):
        return 0
    scale, shift = _scale_and_shift(pyramid.norm)
    for lateral in (pyramid.lateral_8, pyramid.lateral_16, pyramid.lateral_32):
        _scale_weights(lateral, scale)
    pyramid.lateral_8.bias = nn.Parameter(shift, requires_grad=False)
    pyramid.norm = nn.Identity()
    return 1


def _scale_and_shift(norm: _BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """What it multiplies by and what it adds, by channel."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _scale_weights(conv: nn.Conv2d, scale: torch.Tensor) -> None:
    conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
