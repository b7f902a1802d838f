"""EfficientNet-Lite0 (Tan & Le, arXiv 1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation) as a front.

Its features at strides 8, 16 and 32 are joined top-down on the stride-8 grid, as in a feature pyramid (Lin et al.,
arXiv 1612.03144). The first stage ends at stride 8, where an exit sees after a fifth of the operations.

Written here rather than taken from timm, whose import costs as long as PyTorch's own; names, layers and initialisation
are those of timm's ``tf_efficientnet_lite0``, so that its weights fit (``tests/models/test_weights.py`` compares them).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.backbones.fronts import FrontKind, FrontStage, Renormalise, register_front
from crowdexit.models.backbones.same_padding import SameConv2d
from crowdexit.models.stages import Features

_NORM_EPS = 1e-3  # TensorFlow's, with which the weights were trained


class _Group(NamedTuple):
    """Blocks of one resolution: the first has the stride, and its input may have other channels than its output."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


# Table 1 of the paper at width 1; the Lite variant keeps the stem's and the last group's widths.
_STEM = 32
_GROUPS = (
    _Group(1, 3, 1, 1, 16),
    _Group(2, 3, 2, 6, 24),
    _Group(2, 5, 2, 6, 40),
    _Group(3, 3, 2, 6, 80),
    _Group(3, 5, 1, 6, 112),
    _Group(4, 5, 2, 6, 192),
    _Group(1, 3, 1, 6, 320),
)
_STRIDE_8 = 3  # groups up to there
_CHANNELS = {8: 40, 16: 112, 32: 320}


class NormReLU6(nn.BatchNorm2d):
    """Batch normalisation and ReLU6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_NORM_EPS)
        self.act = nn.ReLU6(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(super().forward(x))
        return out


class SeparableConv(nn.Module):
    """A depthwise convolution and a pointwise one, the latter without an activation."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv_dw = _depthwise(channels, kernel, 1)
        self.bn1 = NormReLU6(channels)
        self.conv_pw = nn.Conv2d(channels, out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out, eps=_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn2(self.conv_pw(self.bn1(self.conv_dw(x))))
        return out


class InvertedResidual(nn.Module):
    """Widen, convolve depthwise, narrow again; added to the input where both have the same shape."""

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.conv_pw = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn1 = NormReLU6(wide)
        self.conv_dw = _depthwise(wide, kernel, stride)
        self.bn2 = NormReLU6(wide)
        self.conv_pwl = nn.Conv2d(wide, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out, eps=_NORM_EPS)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv_pw(x))
        y = self.bn3(self.conv_pwl(self.bn2(self.conv_dw(y))))
        out: Tensor = x + y if self.adds else y
        return out


def _depthwise(channels: int, kernel: int, stride: int) -> nn.Conv2d:
    if stride == 1:
        return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
    return SameConv2d(channels, channels, kernel, stride=stride, groups=channels)


def _group(channels: int, group: _Group) -> nn.Sequential:
    """The blocks of a group, the first from so many channels."""
    blocks: list[nn.Module] = []
    for index in range(group.blocks):
        stride = group.stride if index == 0 else 1
        if group.expansion == 1:
            blocks.append(SeparableConv(channels, group.channels, group.kernel))
        else:
            blocks.append(
                InvertedResidual(channels, group.channels, group.kernel, stride=stride, expansion=group.expansion)
            )
        channels = group.channels
    return nn.Sequential(*blocks)


def _initialise(module: nn.Module) -> None:
    """Normal kernels whose variance is two over what each value of the input goes to."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            fan_out = math.prod(conv.kernel_size) * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))


class LiteStem(FrontStage):
    """EfficientNet-Lite0 up to stride 8: B×3×H×W → B×40×H/8×W/8."""

    channels = _CHANNELS[8]

    def __init__(self) -> None:
        super().__init__()
        self.renormalise = Renormalise(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        self.conv_stem = SameConv2d(3, _STEM, 3, stride=2)
        self.bn1 = NormReLU6(_STEM)
        self.blocks = nn.Sequential(*_groups()[:_STRIDE_8])
        _initialise(self)

    def forward(self, features: Features) -> Features:
        image = self.renormalise(features.visual)
        return features.with_visual(self.blocks(self.bn1(self.conv_stem(image))))


class LitePyramid(FrontStage):
    """The rest of EfficientNet-Lite0, joined with the stem's map: B×40×h×w → B×width×h×w.

    Args:
        width: channels of the joined map.
    """

    norms_of_sums: ClassVar[dict[str, tuple[str, ...]]] = {"norm": ("lateral_8", "lateral_16", "lateral_32")}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.channels = width
        groups = _groups()[_STRIDE_8:]  # the second ends at stride 16, the fourth at stride 32
        self.to_16, self.to_32 = nn.Sequential(*groups[:2]), nn.Sequential(*groups[2:])
        _initialise(self)
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


def _groups() -> list[nn.Sequential]:
    widths = (_STEM, *(group.channels for group in _GROUPS))
    return [_group(channels, group) for channels, group in zip(widths, _GROUPS, strict=False)]


def _make(config: Any) -> tuple[LiteStem, LitePyramid]:
    return LiteStem(), LitePyramid(config.fusion_channels[0])


register_front("efficientnet-lite0", FrontKind(make=_make, locations=("V0", "V1"), size_divisor=32))
