"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation) as a front.

Its features at strides 8, 16 and 32 are joined top-down on the stride-8 grid, as in a feature pyramid (Lin et al.,
arXiv 1612.03144). The first stage ends at stride 8, where an exit sees after a fifth of the operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import timm
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.backbones.fronts import FrontKind, FrontStage, Renormalise, register_front
from crowdexit.models.backbones.same_padding import fix_same_padding
from crowdexit.models.stages import Features

_STRIDE_8 = 3  # blocks of layers up to there
_CHANNELS = {8: 40, 16: 112, 32: 320}


class LiteStem(FrontStage):
    """EfficientNet-Lite0 up to stride 8: B×3×H×W → B×40×H/8×W/8."""

    channels = _CHANNELS[8]

    def __init__(self, conv_stem: nn.Module, bn1: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.renormalise = Renormalise(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        self.conv_stem, self.bn1, self.blocks = conv_stem, bn1, nn.Sequential(*blocks)

    def forward(self, features: Features) -> Features:
        image = self.renormalise(features.visual)
        return features.with_visual(self.blocks(self.bn1(self.conv_stem(image))))


class LitePyramid(FrontStage):
    """The rest of EfficientNet-Lite0, joined with the stem's map: B×40×h×w → B×width×h×w.

    Args:
        blocks: the four blocks of layers from stride 8 on; the second ends at stride 16, the fourth at stride 32.
        width: channels of the joined map.
    """

    norms_of_sums: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("lateral_8", "lateral_16", "lateral_32")}

    def __init__(self, blocks: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.channels = width
        self.to_16, self.to_32 = nn.Sequential(*blocks[:2]), nn.Sequential(*blocks[2:])
        self.lateral_8, self.lateral_16, self.lateral_32 = (
            nn.Conv2d(channels, width, 1, bias=False) for channels in _CHANNELS.values()
        )
        self.norm: nn.Module = nn.BatchNorm2d(width)

    def forward(self, features: Features) -> Features:
        at_8 = features.visual
        at_16 = self.to_16(at_8)
        at_32 = self.to_32(at_16)
        joined = _doubled(self.lateral_32(at_32)) + self.lateral_16(at_16)
        joined = _doubled(joined) + self.lateral_8(at_8)
        return features.with_visual(F.relu(self.norm(joined)))


def _doubled(map: Tensor) -> Tensor:
    return F.interpolate(map, scale_factor=2.0, mode="nearest")


def _make(config: Any) -> tuple[LiteStem, LitePyramid]:
    network: Any = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    fix_same_padding(network)
    blocks = list(network.blocks)
    stem = LiteStem(network.conv_stem, network.bn1, blocks[:_STRIDE_8])
    return stem, LitePyramid(blocks[_STRIDE_8:], config.fusion_channels[0])


register_front("efficientnet-lite0", FrontKind(make=_make, locations=("V0", "V1"), size_divisor=32))
