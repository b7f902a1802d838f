"""The effective receptive field of a branch, and the attention of an SL-ViT branch (SL-ViT paper, III).

The paper argues that one layer of attention covers the whole image, but a convolution only a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdexit.data.views import normalise, views
from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.files import blank, write_files
from crowdexit.models.exits import Branch
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import Features, inputs


@dataclass(frozen=True)
class Sight:
    """The receptive field of one branch on the network's canvas.

    Attributes:
        exit: its name. kind: of the branch.
        field: (H, W), |∂ token / ∂ pixel| of the token in the middle, its largest value one.
        wide: the share of the canvas that holds nine tenths of it.
        attention: (rows, columns), what each patch gets of all patches' attention, its sum one; of SL-ViT.
    """

    exit: str
    kind: str
    field: NDArray[np.float32]
    wide: float
    attention: NDArray[np.float32] | None


def receptive_fields(
    network: MultiExitNetwork, image: NDArray[np.uint8], exits: Sequence[str] | None = None
) -> list[Sight]:
    """The receptive fields of branches for an image (for the first tile of a tiled one).

    Args:
        image: H×W×3 uint8, RGB.
        exits: names; default: all early exits.

    Raises:
        CrowdExitError: for an exit that the network has not, or if it has none.
    """
    wanted = [name for name in network.exit_names if name != FINAL] if exits is None else list(exits)
    for name in wanted:
        if name not in network.branches:
            raise CrowdExitError(f"no early exit {name!r} (there are {', '.join(network.branches) or 'none'})")
    if not wanted:
        raise CrowdExitError("this model has no early exits to look through")
    network.eval().requires_grad_(False)
    canvas, _ = views(image, network.config.size, network.config.view)[0]
    tensor = torch.from_numpy(normalise(canvas))[None].requires_grad_()
    features: Features = inputs(tensor)
    sights = []
    for index in range(max(network.stage_of(name) for name in wanted) + 1):
        features = network.stages[index](features)
        for name in wanted:
            branch = network.exit_module(name)
            if network.stage_of(name) == index and isinstance(branch, Branch):
                sights.append(_sight(name, branch, features, tensor))
    return sights


def _sight(name: str, branch: Branch, features: Features, tensor: Tensor) -> Sight:
    tokens = branch.tokens(features)
    rows, columns = branch.token_grid or (1, 1)
    middle = tokens[0, rows // 2 * columns + columns // 2]
    (slope,) = torch.autograd.grad(middle.abs().sum(), tensor, retain_graph=True)
    field = slope[0].abs().sum(0).double()
    order = field.flatten().sort(descending=True).values.cumsum(0)
    wide = float((order < 0.9 * order[-1]).double().mean())
    with torch.no_grad():
        weights = branch.attention_map(features)
    attention: NDArray[np.float32] | None = None if weights is None else weights[0].float().numpy()
    return Sight(name, branch.kind, (field / field.max().clamp(min=1e-30)).float().numpy(), wide, attention)


def draw(image: NDArray[np.uint8], sights: Sequence[Sight], path: Path) -> None:
    """A row for each branch: the image, the field (its square root, so that its edges show), the attention."""
    height, width = sights[0].field.shape
    figure = blank(10, 0.6 + 10 / 3 * height / width * len(sights))
    axes = figure.subplots(len(sights), 3, squeeze=False)
    for row, sight in zip(axes, sights, strict=True):
        row[0].imshow(image)
        row[0].set_title(f"{sight.exit} ({sight.kind})")
        row[1].imshow(np.sqrt(sight.field), cmap="magma")
        row[1].set_title(f"field: nine tenths in {sight.wide:.1%}")
        row[2].axis("off")
        if sight.attention is not None:
            row[2].imshow(image)
            extent = (0.0, float(width), float(height), 0.0)
            row[2].imshow(sight.attention, cmap="magma", alpha=0.6, extent=extent, interpolation="bilinear")
            row[2].set_title("attention")
        for ax in row[:2]:
            ax.axis("off")
    figure.savefig(path)


def write(network: MultiExitNetwork, image: NDArray[np.uint8], sights: Sequence[Sight], path: Path) -> None:
    """Write the image of :func:`draw`, whole.

    Raises:
        CrowdExitError: if it cannot be written, or is no PNG by its name.
    """
    if path.suffix.lower() != ".png":
        raise CrowdExitError(f"{path}: the image is a PNG; name it .png")
    canvas, _ = views(image, network.config.size, network.config.view)[0]
    write_files(path.parent, {path.name: partial(draw, canvas, sights)})
