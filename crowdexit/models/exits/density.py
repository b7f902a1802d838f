"""Exits that end in a density map, whose sum is the count: at any image size, and with where the people are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.exits.feature_map import GammaBeta
from crowdexit.models.exits.registry import ExitLocation, register_exit
from crowdexit.models.stages import Exit, ExitOutput, Features

DensityActivation = Literal["none", "relu", "softplus"]
# softplus(y − 4): an untrained map is nearly empty, and no cell's gradient is ever cut off as a ReLU's is.
_SOFTPLUS_SHIFT = 4.0


def density_conv(channels: int, activation: DensityActivation) -> nn.Conv2d:
    """A fresh 1×1 convolution to the one channel that :func:`density_of` takes."""
    conv = nn.Conv2d(channels, 1, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.constant_(conv.bias, 0.1 if activation == "relu" else 0.0)  # type: ignore[arg-type]
    return conv


def density_of(output: Tensor, valid: Tensor, activation: DensityActivation, scale: float) -> Tensor:
    """The convolution's output as a density map, heads a cell; padding counts for nothing.

    Args:
        output: B×1×h×w.
        valid: B×1×h×w, the share of each cell that is image.
        activation: ``none`` (the paper), ``relu``, or softplus(y − 4).
        scale: the output per head; 100 keeps the numbers of a network trained from scratch near one.
    """
    density = output.float()  # sums over ten thousand cells want float32 whatever the convolutions ran in
    if activation == "softplus":
        density = F.softplus(density - _SOFTPLUS_SHIFT)
    elif activation == "relu":
        density = F.relu(density)
    return density / scale * valid


class DensityBranch(Exit):
    """An early exit that makes a density map: 3×3 convolutions of dilation 2 with ReLU, then a 1×1.

    Not of the papers. It has no weights that belong to a position, so that it works at any image size.

    Args:
        channels: C of the feature map.
        widths: channels of the convolutions.
        audio: A, to fuse the audio by γ and β behind the first convolution (AV1), or 0.
        activation, scale: of :func:`density_of`.
    """

    kind = "density"
    has_density = True

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (48, 32),
        *,
        audio: int = 0,
        activation: DensityActivation = "softplus",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.uses_audio = audio > 0
        self.fuse = GammaBeta(audio, widths[0]) if audio else None
        self.convs = nn.ModuleList()
        for width in widths:
            self.convs.append(nn.Conv2d(channels, width, 3, padding=2, dilation=2))
            channels = width
        self.conv = density_conv(channels, activation)
        self.activation, self.scale = activation, scale

    def forward(self, features: Features) -> ExitOutput:
        # Its numbers are few, and in bfloat16 the gradient of a convolution over 40 channels comes out wrong on some
        # processors (oneDNN with AVX-512).
        with torch.autocast("cpu" if features.visual.is_meta else features.visual.device.type, enabled=False):
            visual = features.grid().to(self.conv.weight.dtype)
            for index, conv in enumerate(self.convs):
                visual = conv(visual)
                if index == 0 and self.fuse is not None:
                    assert features.audio is not None
                    visual = self.fuse(visual, features.audio.to(visual.dtype))
                visual = F.relu(visual)
            density = density_of(self.conv(visual), features.valid_mask, self.activation, self.scale)
        return ExitOutput(density.sum((1, 2, 3)), density)


@register_exit("density", reads=("map",), any_size=True, has_density=True)
def _density(at: ExitLocation) -> DensityBranch:
    return DensityBranch(at.channels, audio=at.fused_audio, **at.settings_for("widths"))
