"""Heads that start from a regression: a picture's one token knows the count, but hardly says so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from crowdexit.backbones.vit import TokenHead
from crowdexit.exits import Branch
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import Exit
from crowdexit.training.cache import walk
from crowdexit.training.losses import Batch

_RIDGE = 1e-4  # a sample
_KNOTS = 32
_ALIVE = 0.05  # by which layers in between stay above zero


def head_of(exit: Exit) -> nn.Sequential | None:
    """The layers behind an exit's one token, or None where its head sees more than one."""
    if isinstance(exit, TokenHead):
        return exit.layers
    return exit.head if isinstance(exit, Branch) and exit.cells == 1 else None


@torch.no_grad()
def fit_heads(network: MultiExitNetwork, names: Collection[str], batches: Iterable[Batch]) -> list[str]:
    """Start heads that see one token from the ridge regression of log (1 + n) on it.

    A ViT's classification token varies by a seventh of its length over crops of 7 to 700 heads, and the count is
    in the directions that vary least, which gradients find last. The regression finds them at once: the rows of
    the first layer all look that way, s ≈ log (1 + n), each from a knot on, and the layers behind add up to eˢ - 1,
    piece by piece straight. No exit starts below zero.

    Args:
        names: of the exits that are to be trained; those whose heads see several tokens stay as they are.
        batches: some of the training samples.

    Returns:
        The names of the exits that were fitted.
    """
    exits: dict[str, Any] = {}
    for name in names:
        module = network.exit_module(name)
        if head_of(module) is not None:
            exits[name] = module
    if not exits:
        return []
    network.eval()
    seen: dict[str, list[Tensor]] = defaultdict(list)
    counts = []
    for batch in batches:
        counts.append(batch["count"])
        for stage, features in walk(network, batch, {network.stage_of(name) for name in exits}):
            for name, module in exits.items():
                if network.stage_of(name) == stage:
                    seen[name].append(module.tokens(features)[:, 0].float())
    logs = torch.log1p(torch.cat(counts)).double()
    for name, module in exits.items():
        head = head_of(module)
        assert head is not None
        _fit(head, torch.cat(seen[name]).double(), logs, module.scale)
    return list(exits)


@torch.no_grad()
def _fit(head: nn.Sequential, tokens: Tensor, logs: Tensor, scale: float) -> None:
    """Fill the linear layers of a head for tokens N×D and log (1 + n) N."""
    mean, middle = tokens.mean(0), logs.mean()
    centred = tokens - mean
    ridge = _RIDGE * len(tokens) * torch.eye(tokens.shape[1], dtype=tokens.dtype)
    look = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (logs - middle))
    first, *between, last = [layer for layer in head if isinstance(layer, nn.Linear)]
    units = first.out_features
    away = units // 4
    # The curve eˢ - 1 from zero to a little beyond the fullest picture, its change of slope at each knot.
    ends = torch.linspace(0, float(logs.max()) + 0.5, min(_KNOTS, units - away) + 1, dtype=tokens.dtype)
    slopes = torch.expm1(ends).diff() / ends.diff()
    bends = slopes.diff(prepend=slopes.new_zeros(1))
    knots = torch.arange(units - away) % len(bends)
    sharing = torch.bincount(knots)[knots]
    # A few units look the other way and say nothing yet. Without them a head whose s fell below zero for all
    # pictures, as a branch's own layer may have it in its first steps, would never learn again.
    sign = torch.cat([torch.ones(units - away), -torch.ones(away)]).to(tokens)
    offsets = torch.cat([ends[knots], torch.full((away,), -float(logs.mean())).to(tokens)])
    first.weight.copy_(sign[:, None] * look)
    first.bias.copy_(sign * (middle - look @ mean) - offsets)
    sums = torch.cat([bends[knots] / sharing / scale, torch.zeros(away).to(tokens)])
    for layer in between:
        layer.weight.copy_(sums.expand_as(layer.weight))
        layer.bias.fill_(_ALIVE)
        sums = torch.full((layer.out_features,), 1 / layer.out_features).to(tokens)
    last.weight.copy_(sums.expand_as(last.weight))
    last.bias.fill_(-_ALIVE if between else 0)
