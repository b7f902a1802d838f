"""Fold batch normalisation into the convolution before it, for inference."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def fold_norms(network: nn.Module) -> int:
    """Fold each batch normalisation that directly follows a convolution into its weights, in place.

    A normalisation follows a convolution if its parent registers it right after one with as many channels. One that
    normalises a sum of convolutions is listed by its parent: ``norms_of_sums``, its name → theirs. Modules keep their
    names; a normalisation with an activation is replaced by that activation.

    Returns:
        The number of folded normalisations.
    """
    folded = 0
    for parent in [*network.modules()]:
        norms_of_sums: dict[str, tuple[str, ...]] = getattr(parent, "norms_of_sums", {})
        before: nn.Module | None = None
        for name, module in [*parent.named_children()]:
            if isinstance(module, _BatchNorm):
                summed: list[nn.Module | None] = [parent.get_submodule(conv) for conv in norms_of_sums.get(name, ())]
                convs = [conv for conv in summed or [before] if isinstance(conv, nn.Conv2d) and _fits(conv, module)]
                if len(convs) == max(1, len(summed)):
                    _fold(module, convs)
                    setattr(parent, name, getattr(module, "act", nn.Identity()))
                    folded += 1
            before = module
    return folded


def _fits(conv: nn.Conv2d, norm: _BatchNorm) -> bool:
    return norm.num_features == conv.out_channels and norm.running_mean is not None


def _fold(norm: _BatchNorm, convs: list[nn.Conv2d]) -> None:
    """Fold a normalisation into the convolutions whose sum it normalises."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    for conv in convs:
        conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
        if conv.bias is not None:
            shift = shift + scale * conv.bias
            conv.bias = None
    convs[0].bias = nn.Parameter(shift if norm.bias is None else shift + norm.bias, requires_grad=False)
