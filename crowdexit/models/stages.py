"""Stages and exits of a network, and the record of features that they pass on.

A network is a chain of stages; an exit reads the output of a stage. Nothing else is shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Features:
    """The state of a batch between two stages. B is the batch, (h, w) the grid at 1/8 of the image.

    Before the first stage ``visual`` is the image itself, B×3×H×W, normalised.

    Attributes:
        visual: a feature map B×C×H×W, or tokens B×(1+N)×D with the classification token first.
        log_mel: B×1×96×64; rows without audio are ignored.
        has_audio: B, bool: whether each sample has audio.
        valid_mask: B×1×h×w, the share of each grid cell that is image rather than padding.
        audio: B×A, the audio vector, from the audio encoder on.
        token_grid: (rows, columns) of the patch tokens when ``visual`` is tokens.
        shortcut: B×C×H×W, input of a residual block for its shortcut, if a stage ends inside the block.
    """

    visual: Tensor
    log_mel: Tensor
    has_audio: Tensor
    valid_mask: Tensor
    audio: Tensor | None = None
    token_grid: tuple[int, int] | None = None
    shortcut: Tensor | None = None

    def grid(self) -> Tensor:
        """The visual features as a map B×C×H×W; for tokens, the patches without the classification token."""
        if self.visual.dim() == 4:
            return self.visual
        assert self.token_grid is not None
        patches = self.visual[:, 1:].transpose(1, 2)  # B×D×N
        out: Tensor = patches.unflatten(2, self.token_grid)
        return out

    def tokens(self) -> Tensor:
        """The visual features as tokens B×(1+N)×D; for a map, the mean followed by its cells."""
        if self.visual.dim() == 3:
            return self.visual
        cells = self.visual.flatten(2).transpose(1, 2)  # B×N×C
        return torch.cat([cells.mean(1, keepdim=True), cells], dim=1)

    def with_visual(self, visual: Tensor) -> Features:
        """The same record with other visual features."""
        return replace(self, visual=visual)

    def with_tokens(self, tokens: Tensor, grid: tuple[int, int]) -> Features:
        """The same record with tokens B×(1+N)×D as visual features, with patches on ``grid``."""
        return replace(self, visual=tokens, token_grid=grid)

    def select(self, keep: Tensor) -> Features:
        """Select samples: ``keep`` is a bool mask or indices over the batch."""
        return self._each(lambda value: value[keep])

    def detach(self) -> Features:
        """The same record, detached: no gradient reaches earlier stages."""
        return self._each(Tensor.detach)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Features:
        """Apply a function to every tensor of the record."""
        changed: dict[str, Any] = {
            f.name: change(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **changed)


def inputs(
    image: Tensor,
    log_mel: Tensor | None = None,
    has_audio: Tensor | None = None,
    valid_mask: Tensor | None = None,
) -> Features:
    """The record before the first stage.

    Args:
        image: B×3×H×W, normalised; H and W multiples of 8.
        log_mel: B×1×96×64, or None without audio.
        has_audio: B bool; default: all, if there is a ``log_mel``.
        valid_mask: B×1×H/8×W/8; default: no padding, ones.
    """
    batch, _, height, width = image.shape
    if log_mel is None:
        log_mel = image.new_zeros(batch, 1, 96, 64)
        has_audio = torch.zeros(batch, dtype=torch.bool, device=image.device)
    if has_audio is None:
        has_audio = torch.ones(batch, dtype=torch.bool, device=image.device)
    if valid_mask is None:
        valid_mask = image.new_ones(batch, 1, height // 8, width // 8)
    return Features(image, log_mel, has_audio, valid_mask)


class Stage(nn.Module):
    """A part of a backbone, from record to record.

    Attributes:
        uses_audio: whether its output may depend on the audio.
        fuses_audio: whether its ``visual`` output depends on the audio.
        encodes_audio: whether it is an audio encoder: it sets ``audio`` and leaves ``visual`` as it is.
    """

    uses_audio: bool = True
    fuses_audio: bool = False
    encodes_audio: bool = False

    def forward(self, features: Features) -> Features:
        raise NotImplementedError  # abstract


@dataclass(frozen=True)
class ExitOutput:
    """Output of an exit for a batch.

    Attributes:
        value: counts B, or class scores B×K.
        density: B×1×h×w, heads per grid cell, from exits that make a map; its sum is the count.
    """

    value: Tensor
    density: Tensor | None = None


class Exit(nn.Module):
    """Predicts from the output of a stage.

    Attributes:
        kind: its name. has_density: whether its output has a density map.
        has_count_weights: whether it has weights for the count alone, for training on counts.
        uses_audio: whether it reads the audio vector directly.
        token_grid: (rows, columns) of its last tokens over the image, or None without tokens.
        count_head: the layers from its tokens to the count that a regression can initialise, or None
            (:func:`crowdexit.training.fit.fit_exits`).
        input_conv: the convolution that reads its feature map, or None.
    """

    kind: str
    has_density: bool = False
    has_count_weights: bool = True
    uses_audio: bool = False
    token_grid: tuple[int, int] | None = None

    @property
    def count_head(self) -> nn.Sequential | None:
        return None

    @property
    def input_conv(self) -> nn.Conv2d | None:
        return None

    def start_at(self, count: float) -> None:
        """Initialise the exit to output about this count, if it can."""

    def start_tied(self) -> None:
        """Initialise position-dependent weights, if any, equally at every position."""

    def forward(self, features: Features) -> ExitOutput:
        raise NotImplementedError  # abstract
