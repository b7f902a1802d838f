"""What an exit is asked for: a density map, a count, a class, or the local counts of its tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from crowdexit.backbones.audiocsrnet import STRIDE, upsample_sum
from crowdexit.stages import Answer
from crowdexit.training.recipe import Recipe

Batch = dict[str, Any]


def evened(crowding: Tensor, usual: float, even: float) -> Tensor:
    """What a balanced loss divides a picture's error by: ``crowding`` at ``even`` 1, the same for all at 0.

    Between the two a power of it, scaled so that a picture of ``usual`` crowding weighs the same throughout.
    """
    return crowding**even * usual ** (1 - even)


def relative_error(
    count: Tensor, heads: Tensor, even: float = 1.0, dark: Tensor | None = None, least: float = 10.0
) -> Tensor:
    """|Σ − n| / (n + ``least``), meaned: an error of ten in fifty weighs like one of a hundred in six hundred.

    With ``even`` below 1 dense pictures weigh more, see :func:`evened`. Of pictures that are ``dark`` (B bool) the
    error counts as it is, / (100 + ``least``): where the crowd cannot be seen, relative errors teach to guess low.
    """
    weight = evened(heads + least, 100 + least, even)
    if dark is not None:
        weight = torch.where(dark, 100 + least, weight)
    return ((count - heads).abs() / weight).mean()


def density_loss(density: Tensor, count: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """Stage one's loss.

    ``l2``: the squared error summed over the map, meaned over the batch (SL-ViT paper, IV).
    ``balanced``: the mean squared error of density × 100, each picture's divided by (1 + n/20), times the
    recipe's ``map``, plus :func:`relative_error`; dense pictures do not own it. Measured from scratch on
    ShanghaiTech. Of dark pictures the latter alone, where the recipe's ``guess`` is set.
    """
    heads = batch["count"]
    if recipe.data.stride == 1:
        density = upsample_sum(density, STRIDE)
    squared = (density - batch["density"]).square()
    if recipe.loss == "l2":
        return squared.sum((1, 2, 3)).mean()
    weighted = 1e4 * squared.mean((1, 2, 3)) / evened(1 + heads / 20, 6, recipe.even)
    if recipe.guess:
        weighted = weighted * ~batch["dark"]
    return recipe.map * weighted.mean() + value_loss(count, batch, recipe)


def value_loss(value: Tensor, batch: Batch, recipe: Recipe) -> Tensor:
    """The recipe's loss of an exit's value.

    Of counts B: mean absolute error (``mae``, the papers'), or :func:`relative_error`. Of class scores B×K: cross
    entropy.
    """
    if recipe.loss == "cross-entropy":
        return F.cross_entropy(value, batch["label"])
    if recipe.loss == "balanced":
        dark = batch["dark"] if recipe.guess else None
        return relative_error(value, batch["count"], recipe.even, dark, recipe.least)
    return (value - batch["count"]).abs().mean()


def exit_loss(answer: Answer, batch: Batch, recipe: Recipe) -> Tensor:
    """What the recipe asks of an exit's answer: of a density map :func:`density_loss`, else :func:`value_loss`."""
    if answer.density is not None and recipe.loss != "mae":
        return density_loss(answer.density, answer.value, batch, recipe)
    return value_loss(answer.value, batch, recipe)


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
