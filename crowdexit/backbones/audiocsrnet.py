"""AudioCSRNet (Hu et al., arXiv 2005.07097) as a chain of four stages with three places for branches.

VGG front (V1) → VGGish (AV1) → first fusion block (AV2) → the other five blocks → density map and count.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.backbones.vgg import Renormalise, VGGFront, VGGish
from crowdexit.exits import CNNExit, GammaBeta, SLViTExit
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import Answer, Exit, Features, Stage

STRIDE = 8
FUSION_CHANNELS = (512, 512, 512, 256, 128, 64)
PLACES = {"V1": 0, "AV1": 1, "AV2": 2}
KINDS = ("cnn", "slvit")
# How the published code of Hu et al. normalises images: mean and deviation of red, green and blue.
OFFICIAL_MEAN = (0.410824894905, 0.370634973049, 0.359682112932)
OFFICIAL_STD = (0.278580576181, 0.26925137639, 0.27156367898)


@dataclass(frozen=True)
class AudioCSRNetConfig:
    """Everything that shapes an AudioCSRNet and its branches. The defaults are the paper's.

    Attributes:
        size: (width, height) of the picture that the branches' grids fit.
        width: channels of the visual path, times this.
        audio_width: channels of VGGish, times this.
        image_norm: how images are normalised before the first convolution: as ``imagenet`` or, for the published
            AudioCSRNet, as its ``official`` code does.
        front_norm: batch normalisation in the two fronts, so that they train from nothing.
        rectify: ReLU on the density (a network from nothing needs it, the paper's has none).
        density_scale: the network's output per head; 100 keeps a from-scratch network's numbers near one.
        count_scale: an early exit's count per unit of its head's output, for the same reason.
        regressor: the dense layer of stage two in place of the plain sum.
        patch, dim, heads: of the SL-ViT branches. filters, pool: of the CNN branches.
        cnn_norm: batch normalisation before γ and β in the CNN branch at AV1, as in the fusion blocks (the paper's
            way); False: none, as in checkpoints that were trained before there was one.
        hidden, dropout: of the MLP heads.
        second_residual: of the SL-ViT encoder.

    Raises:
        ValueError: for a size that the stride of the front does not divide, or a normalisation that is none.
    """

    size: tuple[int, int] = (1024, 576)
    width: float = 1.0
    audio_width: float = 1.0
    image_norm: Literal["imagenet", "official"] = "imagenet"
    front_norm: bool = False
    rectify: bool = False
    density_scale: float = 1.0
    count_scale: float = 1.0
    regressor: bool = False
    patch: int = 8
    dim: int = 32
    heads: int = 12
    filters: int = 16
    pool: int = 4
    cnn_norm: bool = True
    hidden: int = 256
    dropout: float = 0.5
    second_residual: bool = True

    def __post_init__(self) -> None:
        if len(self.size) != 2 or any(side <= 0 or side % STRIDE for side in self.size):
            raise ValueError(f"size {self.size}: wanted width and height, multiples of {STRIDE}")
        if self.image_norm not in ("imagenet", "official"):
            raise ValueError(f"image_norm {self.image_norm!r}: 'imagenet' or 'official'")

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the feature map."""
        return self.size[1] // STRIDE, self.size[0] // STRIDE

    @property
    def step(self) -> int:
        """Sides are multiples of this where SL-ViT branches are to fit: a patch in pixels."""
        return STRIDE * self.patch

    @property
    def bare_step(self) -> int:
        """The map is eight times as small as the picture."""
        return STRIDE

    @property
    def scene(self) -> tuple[int, int]:
        """The whole picture is seen at once."""
        return self.size

    @property
    def view(self) -> Literal["fit"]:
        """A picture of another shape is fitted into ``size``."""
        return "fit"

    @property
    def branch_fields(self) -> tuple[str, ...]:
        """What shapes a branch and nothing else."""
        return "patch", "dim", "heads", "second_residual", "filters", "pool", "cnn_norm", "hidden", "dropout"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""
        return asdict(self)


class FusionBlock(nn.Module):
    """Equation (3): v_{l+1} = ReLU(γ_l ⊙ BN(D_l(v_l)) + β_l), with D_l a 3×3 convolution of dilation 2."""

    def __init__(self, channels: int, out: int, audio: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, 3, padding=2, dilation=2, bias=False)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        self.norm = nn.BatchNorm2d(out)
        self.fuse = GammaBeta(audio, out)

    def forward(self, visual: Tensor, audio: Tensor) -> Tensor:
        return F.relu(self.fuse(self.norm(self.conv(visual)), audio))


class FusionStage(Stage):
    """Consecutive fusion blocks: B×C×h×w and B×A → B×channels[-1]×h×w."""

    def __init__(self, channels: int, outs: Sequence[int], audio: int) -> None:
        super().__init__()
        widths = [channels, *outs]
        self.blocks = nn.ModuleList(FusionBlock(a, b, audio) for a, b in itertools.pairwise(widths))

    def forward(self, features: Features) -> Features:
        assert features.audio is not None
        visual = features.visual
        for block in self.blocks:
            visual = block(visual, features.audio)
        return features.with_visual(visual)


def upsample_sum(density: Tensor, factor: int) -> Tensor:
    """Enlarge a density map without changing its sum: B×1×h×w → B×1×fh×fw.

    Bilinear interpolation by a whole factor gives every source cell the weight f² in all, at the border too.
    """
    return F.interpolate(density, scale_factor=factor, mode="bilinear", align_corners=False) / factor**2


class DensityExit(Exit):
    """The final exit: 1×1 convolution to one channel, the density of heads, and its sum over the picture.

    Cells that are padding count for nothing. In stage two the sum becomes a dense layer over the map at full
    resolution, started as the sum (weights all one, no bias); that layer is bound to one picture size.
    """

    kind = "density"
    maps = True

    def __init__(self, channels: int, config: AudioCSRNetConfig) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.constant_(self.conv.bias, 0.1 if config.rectify else 0.0)  # type: ignore[arg-type]
        self.rectify = config.rectify
        self.scale = config.density_scale
        self.regressor: nn.Linear | None = None
        if config.regressor:
            self.start_regressor(config.size)

    def start_regressor(self, size: tuple[int, int]) -> None:
        """Add stage two's dense layer for pictures of ``size`` (width, height), started as a sum."""
        self.regressor = nn.Linear(size[0] * size[1], 1, bias=False)
        nn.init.ones_(self.regressor.weight)

    def forward(self, features: Features) -> Answer:
        # Sums over ten thousand cells want float32 whatever the convolutions ran in.
        density = self.conv(features.visual).float() / self.scale
        if self.rectify:
            density = F.relu(density)
        density = density * features.inside
        if self.regressor is None:
            return Answer(density.sum((1, 2, 3)), density)
        full = upsample_sum(density, STRIDE).flatten(1)
        # Autocast knows no meta tensors.
        with torch.autocast("cpu" if full.is_meta else full.device.type, enabled=False):
            return Answer(self.regressor(full.to(self.regressor.weight.dtype)).squeeze(1), density)


class AudioCSRNet(MultiExitNetwork):
    """AudioCSRNet with its three places V1, AV1 and AV2.

    At AV1 a branch takes the sound itself; at AV2 the map has it already.
    """

    config: AudioCSRNetConfig
    hears = True

    def __init__(self, config: AudioCSRNetConfig | None = None) -> None:
        c = config or AudioCSRNetConfig()
        official = Renormalise(OFFICIAL_MEAN, OFFICIAL_STD) if c.image_norm == "official" else None
        vgg = VGGFront(c.width, c.front_norm, official)
        vggish = VGGish(c.audio_width, c.front_norm)
        outs = [round(n * c.width) for n in FUSION_CHANNELS]
        first = FusionStage(vgg.channels, outs[:1], vggish.channels)
        rest = FusionStage(outs[0], outs[1:], vggish.channels)
        super().__init__([vgg, vggish, first, rest], DensityExit(outs[-1], c), PLACES, c)
        self._audio = vggish.channels
        self._channels = {"V1": vgg.channels, "AV1": vgg.channels, "AV2": outs[0]}

    def branch_kinds(self, place: str) -> tuple[str, ...]:
        return KINDS

    def make_branch(self, place: str, kind: str, config: AudioCSRNetConfig) -> Exit:
        c = config
        shared: dict[str, Any] = {
            "audio": self._audio if place == "AV1" else 0,
            "hidden": c.hidden,
            "dropout": c.dropout,
            "scale": c.count_scale,
        }
        channels = self._channels[place]
        if kind == "cnn":
            return CNNExit(channels, c.grid, filters=c.filters, pool=c.pool, norm=c.cnn_norm, **shared)
        wide: dict[str, Any] = {"patch": c.patch, "dim": c.dim, "heads": c.heads}
        return SLViTExit(channels, c.grid, second_residual=c.second_residual, **wide, **shared)
