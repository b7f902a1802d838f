"""The two convolutional fronts: VGG-16's first ten layers for the image, VGGish's first six for the audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from crowdexit.models.backbones.fronts import (
    AudioEncoder,
    AudioEncoderKind,
    FrontKind,
    FrontStage,
    Renormalise,
    register_audio_encoder,
    register_front,
)
from crowdexit.models.stages import Features

# How the published code of AudioCSRNet (Hu et al.) normalises images: mean and deviation of red, green and blue.
OFFICIAL_MEAN = (0.410824894905, 0.370634973049, 0.359682112932)
OFFICIAL_STD = (0.278580576181, 0.26925137639, 0.27156367898)
VGG_FRONT: Sequence[int | str] = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512)
VGGISH: Sequence[int | str] = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M")


def conv_chain(layout: Sequence[int | str], channels: int, width: float, norm: bool) -> nn.Sequential:
    """3×3 convolutions with ReLU, and 2×2 max pooling where the layout says ``M``.

    Args:
        layout: channels of each convolution at full width.
        channels: of the input.
        width: all channels times this.
        norm: batch normalisation after each convolution, so that the chain trains from nothing.
    """
    layers: list[nn.Module] = []
    for item in layout:
        if isinstance(item, str):
            layers.append(nn.MaxPool2d(2))
            continue
        out = round(item * width)
        layers.append(nn.Conv2d(channels, out, 3, padding=1, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm2d(out))
        layers.append(nn.ReLU(inplace=True))
        channels = out
    for module in layers:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return nn.Sequential(*layers)


class VGGFront(FrontStage):
    """The first ten convolutions of VGG-16 (``vgg16.features[0:23]``): B×3×H×W → B×512×H/8×W/8.

    Args:
        width: all channels times this.
        norm: batch normalisation after each convolution.
        renormalise: what images go through before the first convolution pads them; default: nothing.
    """

    def __init__(self, width: float = 1.0, norm: bool = False, renormalise: nn.Module | None = None) -> None:
        super().__init__()
        self.renormalise = nn.Identity() if renormalise is None else renormalise
        self.layers = conv_chain(VGG_FRONT, 3, width, norm)
        self.channels = round(512 * width)

    def forward(self, features: Features) -> Features:
        return features.with_visual(self.layers(self.renormalise(features.visual)))


class VGGish(AudioEncoder):
    """The first six convolutions of VGGish (Hershey et al. 2017), averaged over time and frequency.

    Log-mel B×1×96×64 → B×512×6×4 → mean → B×512, less a learned stand-in for what is not heard: recorded silence
    and absent sound are different things. A sample without audio so has the vector zero, and what takes the vector
    (γ and β, an audio patch) answers its bias; its weights can learn to hear while every silent answer stays.
    """

    def __init__(self, width: float = 1.0, norm: bool = False) -> None:
        super().__init__()
        self.layers = conv_chain(VGGISH, 1, width, norm)
        self.channels = round(512 * width)
        self.unheard = nn.Parameter(torch.zeros(self.channels))

    @property
    def trained_on_audio(self) -> nn.Module:
        return self.layers

    def embed(self, log_mel: Tensor) -> Tensor:
        vector: Tensor = self.layers(log_mel).mean((2, 3))
        return vector

    def forward(self, features: Features) -> Features:
        audio = self.embed(features.log_mel)
        audio = audio - self.unheard.to(audio.dtype)
        # Not a product with ``has_audio``: what stands in rows that are not heard may be NaN.
        return replace(features, audio=torch.where(features.has_audio[:, None], audio, 0.0))


def _front(config: Any) -> tuple[VGGFront]:
    official = Renormalise(OFFICIAL_MEAN, OFFICIAL_STD) if config.image_norm == "official" else None
    return (VGGFront(config.width, config.front_norm, official),)


def _audio_encoder(config: Any) -> VGGish:
    return VGGish(config.audio_width, config.front_norm)


register_front("vgg16", FrontKind(_front))
register_audio_encoder("vggish", AudioEncoderKind(_audio_encoder))
