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


class Context(nn.Module):
    """What lies around each cell, from a coarser grid: B×C×h×w → B×outputs×h×w.

    3×3 convolutions with ReLU, the first two of stride 2, the others of dilation 2; then a 1×1, enlarged to the map's
    grid. A cell sees hundreds of pixels around it for a tenth of what convolutions on the fine grid would cost. It
    starts at zero.

    Args:
        channels: C. widths: channels of the convolutions, two of them at least.
        outputs: channels of what it gives.

    Raises:
        ValueError: for fewer than two widths.
    """

    STRIDE = 4  # the sides of the map are multiples of it

    def __init__(self, channels: int, widths: Sequence[int], outputs: int) -> None:
        super().__init__()
        if len(widths) < 2:
            raise ValueError(f"context {tuple(widths)}: wanted the channels of two convolutions at least")
        self.convs = nn.ModuleList()
        for index, width in enumerate(widths):
            coarser = index < 2
            conv = nn.Conv2d(
                channels,
                width,
                3,
                stride=2 if coarser else 1,
                padding=1 if coarser else 2,
                dilation=1 if coarser else 2,
            )
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.convs.append(conv)
            channels = width
        self.out = nn.Conv2d(channels, outputs, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, visual: Tensor) -> Tensor:
        for conv in self.convs:
            visual = F.relu(conv(visual))
        return F.interpolate(self.out(visual), scale_factor=float(self.STRIDE), mode="nearest")


class DensityBranch(Exit):
    """An early exit that makes a density map: 3×3 convolutions of dilation 2 with ReLU, then a 1×1.

    Not of the papers. It has no weights that belong to a position, so that it works at any image size.

    Args:
        channels: C of the feature map.
        widths: channels of the convolutions.
        context: channels of a :class:`Context` that is added to what each convolution gives; empty: there is none.
            With it the sides of the map have to be multiples of 4.
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
        context: Sequence[int] = (),
        audio: int = 0,
        activation: DensityActivation = "softplus",
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.uses_audio = audio > 0
        self.fuse = GammaBeta(audio, widths[0]) if audio else None
        self.context = Context(channels, context, sum(widths) + 1) if context else None
        self.widths = tuple(widths)
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
            context: Sequence[Tensor] = ()
            if self.context is not None:
                context = self.context(visual).split([*self.widths, 1], dim=1)
            for index, conv in enumerate(self.convs):
                visual = conv(visual)
                if index == 0 and self.fuse is not None:
                    assert features.audio is not None
                    visual = self.fuse(visual, features.audio.to(visual.dtype))
                visual = F.relu(visual + context[index] if context else visual)
            visual = self.conv(visual)
            if context:
                visual = visual + context[-1]
            density = density_of(visual, features.valid_mask, self.activation, self.scale)
        return ExitOutput(density.sum((1, 2, 3)), density)


@register_exit("density", reads=("map",), any_size=True, has_density=True)
def _density(at: ExitLocation) -> DensityBranch:
    return DensityBranch(at.channels, audio=at.fused_audio, **at.settings_for("widths", "context"))
