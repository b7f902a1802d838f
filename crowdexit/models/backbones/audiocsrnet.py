"""AudioCSRNet (Hu et al., arXiv 2005.07097) as a chain of stages with exit locations between them.

Front (V1) → audio encoder (AV1) → first fusion block (AV2) → the other five blocks → density map and count. The paper's
front is VGG's, its audio encoder VGGish; a front of several stages has further locations (V0).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from crowdexit.models.backbones import (
    efficientnet,  # noqa: F401  (they register themselves)
    vgg,  # noqa: F401
    yamnet,  # noqa: F401
)
from crowdexit.models.backbones.fronts import audio_encoder_kind, front_kind
from crowdexit.models.exits import (
    Context,
    DensityActivation,
    GammaBeta,
    density_conv,
    density_of,
)
from crowdexit.models.exits.registry import ExitLocation
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.registry import register_models
from crowdexit.models.stages import Exit, ExitOutput, Features, Stage

STRIDE = 8
FUSION_CHANNELS = (512, 512, 512, 256, 128, 64)


@dataclass(frozen=True)
class AudioCSRNetConfig:
    """Everything that shapes an AudioCSRNet and its branches. The defaults are the paper's.

    Attributes:
        size: (width, height) of the image that the branches' grids fit; with ``view`` ``scale`` their product is the
            number of pixels that an image is scaled down to.
        view: ``fit``, or ``scale``: the image's own shape and size, no more than so many pixels, any exit but those
            whose weights belong to positions (:class:`crowdexit.models.network.Config`).
        front, audio_encoder: names of :mod:`crowdexit.models.backbones.fronts`.
        fusion_channels: of the six fusion blocks.
        width: channels of VGG's front and of the fusion blocks, times this.
        audio_width: channels of VGGish, times this.
        audio_features: length of the vector that YAMNet's embedding is projected to.
        image_norm: how VGG's front normalises images before its first convolution: as ``imagenet`` or, for the
            published AudioCSRNet, as its ``official`` code does.
        front_norm: batch normalisation in VGG's front and VGGish, so that they train from scratch.
        density_activation: of the density map (:func:`crowdexit.models.exits.density_of`; the paper's has none).
        density_scale: the network's output per head; 100 keeps a from-scratch network's numbers near one.
        count_scale: an early exit's count per unit of its head's output, for the same reason.
        regressor: the dense layer of stage two in place of the plain sum.
        patch, dim, heads: of the SL-ViT branches. filters, pool: of the CNN branches.
        cnn_norm: batch normalisation before γ and β in the CNN branch at AV1, as in the fusion blocks (the paper's
            way); False: none, as in checkpoints that were trained before there was one.
        hidden, dropout: of the MLP heads.
        second_residual: of the SL-ViT encoder.
        density_widths: channels of the density branches. density_context: of what they see around each cell, from a
            coarser grid (:class:`crowdexit.models.exits.Context`), or empty; for fronts that divide images by 32.

    Raises:
        ValueError: for a size that the stride of the front does not divide, or a normalisation that is none.
    """

    size: tuple[int, int] = (1024, 576)
    view: Literal["fit", "scale"] = "fit"
    front: str = "vgg16"
    audio_encoder: str = "vggish"
    fusion_channels: tuple[int, ...] = FUSION_CHANNELS
    width: float = 1.0
    audio_width: float = 1.0
    audio_features: int = 64
    image_norm: Literal["imagenet", "official"] = "imagenet"
    front_norm: bool = False
    density_activation: DensityActivation = "none"
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
    density_widths: tuple[int, ...] = (48, 32)
    density_context: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        step = self.bare_step
        audio_encoder_kind(self.audio_encoder)
        if len(self.size) != 2 or any(side <= 0 or side % step for side in self.size):
            raise ValueError(f"size {self.size}: wanted width and height, multiples of {step}")
        if self.view == "scale" and self.regressor:
            raise ValueError("a regressor's weights belong to positions: it needs view 'fit'")
        if self.image_norm not in ("imagenet", "official"):
            raise ValueError(f"image_norm {self.image_norm!r}: 'imagenet' or 'official'")

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the feature map."""
        return self.size[1] // STRIDE, self.size[0] // STRIDE

    @property
    def step(self) -> int:
        """Sides are multiples of this where SL-ViT branches are to fit: a patch in pixels."""
        return math.lcm(STRIDE * self.patch, self.bare_step) if self.view == "fit" else self.bare_step

    @property
    def bare_step(self) -> int:
        """What the front divides the image's sides by."""
        return front_kind(self.front).size_divisor

    @property
    def scene(self) -> tuple[int, int]:
        """The whole image is seen at once."""
        return self.size

    @property
    def branch_fields(self) -> tuple[str, ...]:
        """What shapes a branch and nothing else."""
        cnn = ("filters", "pool", "cnn_norm")
        return (
            "patch",
            "dim",
            "heads",
            "second_residual",
            *cnn,
            "hidden",
            "dropout",
            "density_widths",
            "density_context",
        )

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

    fuses_audio = True

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
    """The final exit: 1×1 convolution to one channel, the density of heads, and its sum over the image.

    Cells that are padding count for nothing. In stage two the sum becomes a dense layer over the map at full
    resolution, started as the sum (weights all one, no bias); that layer is bound to one image size.
    """

    kind = "density"
    has_density = True

    def __init__(self, channels: int, config: AudioCSRNetConfig) -> None:
        super().__init__()
        self.conv = density_conv(channels, config.density_activation)
        self.activation, self.scale = config.density_activation, config.density_scale
        self.regressor: nn.Linear | None = None
        if config.regressor:
            self.start_regressor(config.size)

    @property
    def has_count_weights(self) -> bool:  # type: ignore[override]
        return self.regressor is not None

    def start_regressor(self, size: tuple[int, int]) -> None:
        """Add stage two's dense layer for images of ``size`` (width, height), started as a sum."""
        self.regressor = nn.Linear(size[0] * size[1], 1, bias=False)
        nn.init.ones_(self.regressor.weight)

    def forward(self, features: Features) -> ExitOutput:
        density = density_of(self.conv(features.visual), features.valid_mask, self.activation, self.scale)
        if self.regressor is None:
            return ExitOutput(density.sum((1, 2, 3)), density)
        full = upsample_sum(density, STRIDE).flatten(1)
        # Autocast knows no meta tensors.
        with torch.autocast("cpu" if full.is_meta else full.device.type, enabled=False):
            return ExitOutput(self.regressor(full.to(self.regressor.weight.dtype)).squeeze(1), density)


class AudioCSRNet(MultiExitNetwork):
    """AudioCSRNet with its exit locations: those of its front (V1), AV1 and AV2.

    At AV1 a branch takes the audio itself; at AV2 the map has it already.
    """

    config: AudioCSRNetConfig
    final_uses_audio = True
    published_kinds = ("vgg16", "vggish", "efficientnet-lite0", "yamnet", "csrnet", "audiocsrnet")

    def __init__(self, config: AudioCSRNetConfig | None = None) -> None:
        c = config or AudioCSRNetConfig()
        front = front_kind(c.front)
        images, audio = front.make(c), audio_encoder_kind(c.audio_encoder).make(c)
        channels = [stage.channels for stage in images]
        outs = [round(n * c.width) for n in c.fusion_channels]
        first = FusionStage(channels[-1], outs[:1], audio.channels)
        rest = FusionStage(outs[0], outs[1:], audio.channels)
        locations = (*front.locations, "AV1", "AV2")
        places = {name: index for index, name in enumerate(locations)}
        super().__init__([*images, audio, first, rest], DensityExit(outs[-1], c), places, c)
        self._audio = audio.channels
        self._channels = dict(zip(locations, (*channels, channels[-1], outs[0]), strict=True))

    def published_problem(self, kind: str) -> str | None:
        """Why published weights of a kind do not fit this configuration, or None."""
        if self.config.front_norm:
            return f"{kind}: published weights fit no network with batch normalisation in its fronts"
        if kind == "audiocsrnet" and self.config.image_norm != "official":
            return "audiocsrnet: trained on images normalised in its own way: set changes: {image_norm: official}"
        return None

    def exit_location(self, place: str, config: AudioCSRNetConfig) -> ExitLocation:
        """A feature map at 1/8 of the image. The paper's network (with VGG's front) has no exits with density maps."""
        c = config
        if c.density_context and c.step % (STRIDE * Context.STRIDE):
            raise ValueError(f"density_context: the image's sides are to be multiples of {STRIDE * Context.STRIDE}")
        return ExitLocation(
            channels=self._channels[place],
            grid=c.grid,
            any_size=c.view == "scale",
            audio=self._audio if place == "AV1" else 0,
            fuses_audio=place == "AV1",
            takes_density=c.view == "scale" or c.front != "vgg16",
            settings={
                **{"patch": c.patch, "dim": c.dim, "heads": c.heads, "second_residual": c.second_residual},
                **{"filters": c.filters, "pool": c.pool, "norm": c.cnn_norm},
                **{"hidden": c.hidden, "dropout": c.dropout, "scale": c.count_scale},
                **{"widths": c.density_widths, "context": c.density_context},
            },
        )


_FROM_SCRATCH: dict[str, Any] = {
    **{"front_norm": True, "density_activation": "relu", "density_scale": 100.0, "count_scale": 100.0}
}
register_models(
    AudioCSRNet,
    {
        "audiocsrnet": AudioCSRNetConfig(),
        "audiocsrnet-m": AudioCSRNetConfig(
            size=(1024, 768), width=0.75, audio_width=0.5, filters=16, hidden=128, **_FROM_SCRATCH
        ),
        "audiocsrnet-s": AudioCSRNetConfig(
            size=(1024, 768), width=0.5, audio_width=0.25, dim=16, filters=8, hidden=64, **_FROM_SCRATCH
        ),
        # A pretrained front and a pretrained audio encoder, and images of any size and shape.
        "audiocsrnet-lite": AudioCSRNetConfig(
            size=(1024, 768),
            view="scale",
            front="efficientnet-lite0",
            audio_encoder="yamnet",
            fusion_channels=(96, 96, 96, 64, 48, 32),
            density_activation="softplus",
        ),
    },
)
