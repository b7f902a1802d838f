"""YAMNet (Plakal & Ellis, TensorFlow Models; MobileNet v1, arXiv 1704.04861, on AudioSet) as an audio encoder."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.backbones.fronts import AudioEncoder, AudioEncoderKind, register_audio_encoder
from crowdexit.models.backbones.same_padding import SameConv2d

CHANNELS = 1024  # of its embedding
BANDS = 64  # of the log-mel
HIDDEN = 128
# Output channels and stride of each depthwise-separable block.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *((512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1)),
)
_EPSILON = 1e-4  # of its batch normalisations
# Log-mels are prepared as VGGish takes them, log(mel + 0.01); YAMNet takes log(mel + 0.001).
_PREPARED_OFFSET, _OFFSET = 0.01, 0.001
# What brings each part of the vector that is projected near 0 ± 1: means and deviations over simulated crowds.
_EMBEDDING, _MEAN, _STD = (0.05, 0.16), (-0.65, 1.1), (0.54, 0.22)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=_EPSILON)


def _block(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            depthwise=SameConv2d(channels, channels, 3, stride=stride, groups=channels),
            depthwise_bn=_norm(channels),
            relu1=nn.ReLU(),
            pointwise=nn.Conv2d(channels, out, 1, bias=False),
            pointwise_bn=_norm(out),
            relu2=nn.ReLU(),
        )
    )


class YAMNet(AudioEncoder):
    """Log-mel B×1×96×64 → YAMNet's embedding and the bands' levels B×1152 → projected B×A; zero without audio.

    YAMNet was trained to name what it hears, loud or soft: of how loud a crowd is, its embedding keeps little. So each
    band's mean and standard deviation over the second stand beside it.

    Args:
        features: A.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.channels = features
        self.conv, self.bn = SameConv2d(1, 32, 3, stride=2), _norm(32)
        self.blocks = nn.Sequential()
        channels = 32
        for out, stride in BLOCKS:
            self.blocks.append(_block(channels, out, stride))
            channels = out
        self.project = nn.Sequential(nn.Linear(CHANNELS + 2 * BANDS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, features))

    @property
    def trained_on_audio(self) -> nn.Module:
        return self.project

    def embedding(self, log_mel: Tensor) -> Tensor:
        """Prepared log-mel B×1×96×64 → YAMNet's embedding B×1024."""
        mel = (torch.exp(log_mel) - _PREPARED_OFFSET).clamp(min=0)
        x = F.relu(self.bn(self.conv(torch.log(mel + _OFFSET))))
        embedding: Tensor = self.blocks(x).mean((2, 3))
        return embedding

    def embed(self, log_mel: Tensor) -> Tensor:
        std, mean = torch.std_mean(log_mel.squeeze(1), dim=1, unbiased=False)
        parts = ((self.embedding(log_mel), _EMBEDDING), (mean, _MEAN), (std, _STD))
        vector: Tensor = self.project(torch.cat([(part - centre) / by for part, (centre, by) in parts], 1))
        return vector


def _make(config: Any) -> YAMNet:
    return YAMNet(config.audio_features)


register_audio_encoder("yamnet", AudioEncoderKind(_make))
