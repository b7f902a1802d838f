"""Losses on density maps, counts, classes, and local counts of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crowdexit.models.backbones.audiocsrnet import STRIDE, upsample_sum
from crowdexit.models.stages import ExitOutput
from crowdexit.training.recipe import Recipe

Batch = dict[str, Any]


# Sides in cells of the squares in which ``poisson`` adds up heads, each with its weight; the whole has one more.
_SQUARES = {1: 0.25, 2: 0.5, 4: 1.0, 8: 1.0}
_WHOLE = 1.0
_CROWD = 30.0  # heads in an image above which its weight decreases
_LEAST = 1e-6  # added to both sides, to avoid the logarithm of zero


def evened(crowding: Tensor, nominal: float, even: float) -> Tensor:
    """Divisor of an image's error in a balanced loss: ``crowding`` for ``even`` 1, constant for 0.

    In between a power of it, scaled so that the weight of an image of ``nominal`` crowding does not change.
    """
    out: Tensor = crowding**even * nominal ** (1 - even)
    return out


def relative_error(
    count: Tensor, heads: Tensor, even: float = 1.0, dark: Tensor | None = None, least: float = 10.0
) -> Tensor:
    """|Σ − n| / (n + ``least``), meaned: an error of ten in fifty weighs like one of a hundred in six hundred.

    With ``even`` below 1 dense images weigh more, see :func:`evened`. Of images that are ``dark`` (B bool) the
    error counts as it is, / (100 + ``least``): in the dark, relative errors bias counts towards zero.
    """
    weight = evened(heads + least, 100 + least, even)
    if dark is not None:
        weight = torch.where(dark, 100 + least, weight)
    return ((count - heads).abs() / weight).mean()


def density_loss(density: Tensor, count: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """Stage one's loss.

    ``l2``: the squared error summed over the map, meaned over the batch (SL-ViT paper, IV).
    ``poisson``: :func:`poisson_loss`.
    ``balanced``: the mean squared error of density × 100, each image's divided by (1 + n/20), times the
    recipe's ``map``, plus :func:`relative_error`; dense images do not own it. Measured from scratch on
    ShanghaiTech. Of dark images the latter alone, where the recipe's ``guess`` is set.
    """
    if recipe.loss == "poisson":
        return poisson_loss(density, batch["density"])
    heads = batch["count"]
    if recipe.data.stride == 1:
        density = upsample_sum(density, STRIDE)
    squared = (density - batch["density"]).square()
    if recipe.loss == "l2":
        of_maps: Tensor = squared.sum((1, 2, 3)).mean()
        return of_maps
    weighted = 1e4 * squared.mean((1, 2, 3)) / evened(1 + heads / 20, 6, recipe.even)
    if recipe.guess:
        weighted = weighted * ~batch["dark"]
    out: Tensor = recipe.map * weighted.mean() + value_loss(count, batch, recipe)
    return out


def value_loss(value: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The recipe's loss of an exit's value.

    Of counts B: mean absolute error (``mae``, the papers'), :func:`relative_error`, or :func:`poisson_count_loss`. Of
    class scores B×K: cross entropy.
    """
    if recipe.loss == "cross-entropy":
        return F.cross_entropy(value, batch["label"])
    if recipe.loss == "poisson":
        return poisson_count_loss(value, batch["count"])
    if recipe.loss == "balanced":
        dark = batch["dark"] if recipe.guess else None
        return relative_error(value, batch["count"], recipe.even, dark, recipe.least)
    out: Tensor = (value - batch["count"]).abs().mean()
    return out


def exit_loss(answer: ExitOutput, batch: Batch, recipe: Recipe) -> Tensor:
    """The recipe's loss of an exit's output: :func:`density_loss` for a density map, else :func:`value_loss`."""
    if answer.density is not None and recipe.loss != "mae":
        return density_loss(answer.density, answer.value, batch, recipe)
    return value_loss(answer.value, batch, recipe)


def _poisson(rate: Tensor, heads: Tensor, cells: float) -> Tensor:
    """λ − n log λ of each part, which is smallest if λ equals n on average; ``cells``: size of a part."""
    least = _LEAST * cells
    return rate - (heads + least) * torch.log(rate + least)


def _crowd_weight(count: Tensor) -> Tensor:
    """The weight of an image, by its estimate (by the truth, estimates would be biased low)."""
    return 1 / (1 + count.detach() / _CROWD)


def poisson_loss(density: Tensor, heads: Tensor) -> Tensor:
    """The negative log-likelihood of heads under Poisson distributions with the density's means.

    Of the heads in squares of 1, 2, 4 and 8 cells a side and in the whole, each image weighted by 1 / (1 + λ / 30)
    where λ is its estimate. Unlike absolute errors it is not content with a median, which in sparse cells is zero.

    Args:
        density: B×1×h×w, heads a cell, not negative.
        heads: B×1×h×w, how many there are in each cell.
    """
    count = density.sum((1, 2, 3))
    total = _WHOLE * _poisson(count, heads.sum((1, 2, 3)), density[0].numel())
    for side, weight in _SQUARES.items():
        rate, number = (F.avg_pool2d(m, side, ceil_mode=True, divisor_override=1) for m in (density, heads))
        total = total + weight * _poisson(rate, number, side**2).sum((1, 2, 3))
    return (total * _crowd_weight(count)).mean() / _CROWD


def poisson_count_loss(count: Tensor, heads: Tensor) -> Tensor:
    """The same of counts B as a whole; a count below zero is drawn back to it."""
    rate = F.relu(count)
    missing = F.relu(-count) * (1 + heads)
    return ((_poisson(rate, heads, 1) + missing) * _crowd_weight(rate)).mean() / _CROWD


def local_error(counts: Tensor, density: Tensor, heads: Tensor, grid: tuple[int, int]) -> Tensor:
    """Σ |local count − local heads| / (n + 10), meaned: what :func:`relative_error` asks of the whole, of each part.

    Args:
        counts: B×N, N cells of ``grid`` (rows, columns) in reading order.
        density: B×1×h×w, heads per cell of a finer grid that ``grid`` divides.
        heads: B, n.
    """
    kernel = (density.shape[2] // grid[0], density.shape[3] // grid[1])
    local = F.avg_pool2d(density, kernel).flatten(1) * (kernel[0] * kernel[1])
    return ((counts - local).abs().sum(1) / (heads + 10)).mean()
