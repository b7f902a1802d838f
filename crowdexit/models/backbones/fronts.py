"""The registry of AudioCSRNet's fronts (image encoders) and audio encoders; each is registered beside its code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from crowdexit.data.views import MEAN, STD
from crowdexit.models.stages import Features, Stage


class Renormalise(nn.Module):
    """Images normalised by ImageNet's mean and deviation → as other weights expect them, B×3×H×W.

    It stands before the first convolution, not in its weights: what the convolution pads with is zero after it.

    Args:
        mean, std: that those weights expect, of 1, by channel, red first.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        # Numbers rather than buffers: they belong to the architecture, and are there on the meta device too.
        self.scale = [float(ours) / theirs for ours, theirs in zip(STD, std, strict=True)]
        self.shift = [(float(ours) - theirs) / by for ours, theirs, by in zip(MEAN, mean, std, strict=True)]

    def forward(self, image: Tensor) -> Tensor:
        return image * image.new_tensor(self.scale)[:, None, None] + image.new_tensor(self.shift)[:, None, None]


class FrontStage(Stage):
    """A stage that ends in a feature map at 1/8 of the image.

    Attributes:
        channels: C of its map.
    """

    channels: int
    uses_audio = False


class AudioEncoder(Stage):
    """A stage that sets ``features.audio``, B×A, to zero where there is no audio.

    Attributes:
        channels: A.
    """

    channels: int
    encodes_audio = True

    @property
    def trained_on_audio(self) -> nn.Module:
        """What a recipe's stage ``hearing`` trains of it: all, unless an encoder says otherwise."""
        return self

    def embed(self, log_mel: Tensor) -> Tensor:
        """Prepared log-mel B×1×96×64 → what is known of the audio, B×A."""
        raise NotImplementedError  # abstract

    def forward(self, features: Features) -> Features:
        # Not a product with ``has_audio``: what stands in rows without audio may be NaN.
        audio = self.embed(features.log_mel)
        return replace(features, audio=torch.where(features.has_audio[:, None], audio, 0.0))


@dataclass(frozen=True)
class FrontKind:
    """An image encoder that AudioCSRNet can begin with.

    Attributes:
        make: its stages, from the network's configuration.
        locations: the exit location at the end of each stage.
        size_divisor: image sides are multiples of this.
    """

    make: Callable[[Any], Sequence[FrontStage]]
    locations: tuple[str, ...] = ("V1",)
    size_divisor: int = 8


@dataclass(frozen=True)
class AudioEncoderKind:
    """An audio encoder that AudioCSRNet can have; ``make`` builds it from the network's configuration."""

    make: Callable[[Any], AudioEncoder]


_FRONTS: dict[str, FrontKind] = {}
_AUDIO_ENCODERS: dict[str, AudioEncoderKind] = {}


def register_front(name: str, kind: FrontKind) -> None:
    """Make a front known by name."""
    _FRONTS[name] = kind


def register_audio_encoder(name: str, kind: AudioEncoderKind) -> None:
    """Make an audio encoder known by name."""
    _AUDIO_ENCODERS[name] = kind


def front_kind(name: str) -> FrontKind:
    """The front of that name.

    Raises:
        ValueError: if there is none.
    """
    out: FrontKind = _found(_FRONTS, name, "front")
    return out


def audio_encoder_kind(name: str) -> AudioEncoderKind:
    """The audio encoder of that name.

    Raises:
        ValueError: if there is none.
    """
    out: AudioEncoderKind = _found(_AUDIO_ENCODERS, name, "audio encoder")
    return out


def _found(registry: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in registry:
        raise ValueError(f"no {what} {name!r} (there are {', '.join(registry)})")
    return registry[name]
