"""Exits that start from a regression: what stands in a frozen network knows the count, but hardly says so."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.exits import Branch
from crowdexit.models.network import MultiExitNetwork
from crowdexit.training.cache import iter_features
from crowdexit.training.losses import Batch, evened
from crowdexit.training.recipe import Recipe

_RIDGE = 1e-4  # of one token, a sample
_MAP_RIDGE = 1e-3  # of a map's channels, of their mean variance
_KNOTS = 32
_CELL = 50.0  # heads in one cell of a branch's grid, beyond which nothing is told apart at the start
_ALIVE = 0.05  # by which layers in between stay above zero


@torch.no_grad()
def fit_exits(
    network: MultiExitNetwork, names: Collection[str], batches: Callable[[], Iterable[Batch]], recipe: Recipe
) -> list[str]:
    """Start exits from ridge regressions of the count on what they see.

    A ViT's classification token varies by a seventh of its length over crops of 7 to 700 heads, and the count is
    in the directions that vary least, which gradients find last. Regressions find them at once:

    - A head that sees one token: of log (1 + n) on it. The rows of the first layer all look that way,
      s ≈ log (1 + n), each from a knot on, and the layers behind add up to eˢ - 1, piece by piece straight. No exit
      starts below zero.
    - A branch that reads a map through a convolution: first this, of log (1 + heads in a cell) on the map's mean
      over the cell; then its head, of n itself on the mean over the cells, as parts add up, with the weights of the
      ``balanced`` loss.

    Args:
        names: of the exits that are to be trained; those of other kinds stay as they are.
        batches: some of the training samples, each time from the first.

    Returns:
        The names of the exits that were fitted.
    """
    exits: dict[str, Any] = {}
    for name in names:
        module = network.exit_module(name)
        if module.count_head is not None:
            exits[name] = module
    if not exits:
        return []
    network.eval()
    eyes = {name: module for name, module in exits.items() if module.input_conv is not None}
    if eyes:
        _fit_eyes(network, eyes, batches())
    seen: dict[str, list[Tensor]] = defaultdict(list)
    counts = []
    for batch in batches():
        counts.append(batch["count"])
        for stage, features in iter_features(network, batch, {network.stage_of(name) for name in exits}):
            for name, module in exits.items():
                if network.stage_of(name) == stage:
                    seen[name].append(module.tokens(features)[:, : _cells(module)].mean(1).float())
    heads = torch.cat(counts).double()
    for name, module in exits.items():
        head = module.count_head
        tokens = torch.cat(seen[name]).double()
        if name in eyes:
            weights = evened(heads + recipe.least, 100 + recipe.least, recipe.even) ** -2
            _fit_count(head, tokens, heads, weights, module)
        else:
            _fit_log(head, tokens, torch.log1p(heads), module.scale)
    return list(exits)


def _cells(exit: Any) -> int:
    """How many of an exit's tokens show the image."""
    grid = getattr(exit, "token_grid", None)
    return grid[0] * grid[1] if grid else 1


def _fit_eyes(network: MultiExitNetwork, branches: dict[str, Branch], batches: Iterable[Batch]) -> None:
    """Have branches' convolutions look at how many heads a cell holds.

    Each channel tells log (1 + heads) from another knot on: where a ReLU follows, all look the same way and are cut
    off at their knots; where none does, each looks at what is cut off already.
    """
    moments: dict[str, Tensor] = {}
    for batch in batches:
        for stage, features in iter_features(network, batch, {network.stage_of(name) for name in branches}):
            for name, branch in branches.items():
                if network.stage_of(name) != stage:
                    continue
                assert branch.token_grid is not None
                cells = F.adaptive_avg_pool2d(branch.input_map(features).float(), branch.token_grid)
                density = F.adaptive_avg_pool2d(batch["density"], branch.token_grid)
                local = density * (batch["density"][0].numel() / density[0].numel())
                log_counts = torch.log1p(local).flatten()[:, None]
                if not branch.rectifies:
                    log_counts = F.relu(log_counts - _knots_of(branch))
                ones = torch.ones_like(log_counts[:, :1])
                both = torch.cat([ones, cells.flatten(2).mT.flatten(0, 1), log_counts], dim=1).double()
                moments[name] = moments.get(name, 0) + both.mT @ both
    for name, branch in branches.items():
        input_conv, knots = branch.input_conv, _knots_of(branch)
        assert input_conv is not None
        assert input_conv.bias is not None
        make_batch, offset = _solved(moments[name], input_conv.in_channels, _MAP_RIDGE)
        if branch.rectifies:
            make_batch, offset = make_batch.expand(-1, len(knots)), offset - knots
        input_conv.weight.copy_(
            (make_batch.mT[:, :, None, None] / input_conv.weight[0, 0].numel()).expand_as(input_conv.weight)
        )
        input_conv.bias.copy_(offset)


def _knots_of(branch: Branch) -> Tensor:
    """From where on each of a convolution's channels tells log (1 + heads) in a cell."""
    assert branch.input_conv is not None
    return torch.linspace(0, math.log1p(_CELL) * 0.8, branch.input_conv.out_channels)


def _solved(moments: Tensor, inputs: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The ridge regression of K targets on C inputs from the sums of (1, inputs, targets) times itself.

    Args:
        ridge: of the inputs' mean variance.

    Returns:
        Weights C×K and offsets K.
    """
    mean = moments[0, 1:] / moments[0, 0]
    spread = moments[1:, 1:] / moments[0, 0] - torch.outer(mean, mean)
    squares = spread[:inputs, :inputs]
    squares = squares + ridge * squares.diagonal().mean() * torch.eye(inputs).to(squares)
    weights = torch.linalg.solve(squares, spread[:inputs, inputs:])
    return weights, mean[inputs:] - mean[:inputs] @ weights


def _fit_count(head: nn.Sequential, tokens: Tensor, heads: Tensor, weights: Tensor, branch: Branch) -> None:
    """Fill a head over several tokens from the regression of n (N) on their mean, N×d."""
    ones = torch.ones_like(heads)[:, None]
    both = torch.cat([ones, tokens, heads[:, None]], dim=1)
    make_batch, offset = _solved(both.mT @ (both * weights[:, None]), branch.dim, _RIDGE)
    # Numbers near one in every layer, so that steps of one length suit them all.
    make_batch, offset = make_batch / branch.scale, offset / branch.scale
    shared = torch.zeros(branch.cells, branch.dim).to(make_batch)  # the audio's patch says nothing yet
    shared[: _cells(branch)] = make_batch[:, 0] / _cells(branch)
    ends = torch.tensor([0.0, 1.0]).to(make_batch)
    _fill(head, shared.flatten(), offset[0], float(heads.mean()) / branch.scale, ends, ends.diff(), 1.0)


def _fit_log(head: nn.Sequential, tokens: Tensor, logs: Tensor, scale: float) -> None:
    """Fill a head over one token from the regression of log (1 + n) on it, N×D."""
    mean, middle = tokens.mean(0), logs.mean()
    centred = tokens - mean
    ridge = _RIDGE * len(tokens) * torch.eye(tokens.shape[1]).to(tokens)
    make_batch = torch.linalg.solve(centred.T @ centred + ridge, centred.T @ (logs - middle))
    # The curve eˢ - 1 from zero to a little beyond the fullest image.
    first = head[0]
    assert isinstance(first, nn.Linear)
    knots = min(_KNOTS, first.out_features - first.out_features // 4)
    ends = torch.linspace(0, float(logs.max()) + 0.5, knots + 1).to(tokens)
    _fill(
        head, make_batch, middle - make_batch @ mean, float(middle), ends, torch.expm1(ends).diff() / ends.diff(), scale
    )


@torch.no_grad()
def _fill(
    head: nn.Sequential, make_batch: Tensor, offset: Tensor, middle: float, ends: Tensor, slopes: Tensor, scale: float
) -> None:
    """Fill the linear layers of a head so that it answers a curve of s = look · x + offset, from zero on.

    Args:
        middle: what s usually is.
        ends: of the curve's straight pieces. slopes: of each, the last one's beyond the end.
        scale: the head's output is the curve divided by this.
    """
    first, *between, last = [layer for layer in head if isinstance(layer, nn.Linear)]
    units = first.out_features
    away = units // 4
    bends = slopes.diff(prepend=slopes.new_zeros(1))
    knots = torch.arange(units - away) % len(bends)
    sharing = torch.bincount(knots)[knots]
    # A few units look the other way and say nothing yet. Without them a head whose s fell below zero for all
    # images, as a branch's own layer may have it in its first steps, would never learn again.
    sign = torch.cat([torch.ones(units - away), -torch.ones(away)]).to(make_batch)
    offsets = torch.cat([ends[knots], torch.full((away,), -middle).to(make_batch)])
    first.weight.copy_(sign[:, None] * make_batch)
    first.bias.copy_(sign * offset - offsets)
    sums = torch.cat([bends[knots] / sharing / scale, torch.zeros(away).to(make_batch)])
    for layer in between:
        layer.weight.copy_(sums.expand_as(layer.weight))
        layer.bias.fill_(_ALIVE)
        sums = torch.full((layer.out_features,), 1 / layer.out_features).to(make_batch)
    last.weight.copy_(sums.expand_as(last.weight))
    last.bias.fill_(-_ALIVE if between else 0)
