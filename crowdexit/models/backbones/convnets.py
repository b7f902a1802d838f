"""The convolutional classifiers of the SL-ViT paper as chains of three stages with two places for branches.

torchvision's ResNet, DenseNet and InceptionV3, cut where the paper's branches stand (section IV-A, figure 3), under
the paper's top: dense, dropout, dense. Their smaller siblings are cut in the same way, and train from nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from crowdexit.models.exits.registry import ExitLocation
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.registry import register_models
from crowdexit.models.stages import Exit, ExitOutput, Features, Stage, inputs

RESNETS = ("resnet18", "resnet34")
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
DENSENETS = ("densenet121", "densenet169", "densenet201")
INCEPTIONS = ("inception_v3",)


@dataclass(frozen=True)
class ConvNetConfig:
    """Everything that shapes a convolutional classifier and its branches.

    Attributes:
        architecture: torchvision's name of it.
        size: (width, height) of the image.
        outputs: classes.
        stride: of a ResNet with bottlenecks, where a stage halves its map: ``first``, in the first 1×1 convolution
            (He et al., and the paper's tables), or ``middle``, in the 3×3 (torchvision, and its weights).
        top: width of the top's first dense layer, which the paper does not print; 0: one dense layer, as torchvision's.
        top_dropout: between the top's two.
        patch: p of the SL-ViT branches; 0: by the paper's rule (see :func:`crowdexit.models.exits.patch_size`).
        dim, heads: of the SL-ViT branches. filters, pool: of the CNN branches. hidden, dropout: of the MLP heads.
        second_residual: of the SL-ViT encoder.

    Raises:
        ValueError: for an architecture that is not here, a stride that it has not, or an image too small for it.
    """

    architecture: str = "resnet152"
    size: tuple[int, int] = (224, 224)
    outputs: int = 10
    stride: Literal["first", "middle"] = "first"
    top: int = 256
    top_dropout: float = 0.5
    patch: int = 0
    dim: int = 32
    heads: int = 12
    filters: int = 16
    pool: int = 2
    hidden: int = 256
    dropout: float = 0.5
    second_residual: bool = True

    def __post_init__(self) -> None:
        known = (*RESNETS, *BOTTLENECKS, *DENSENETS, *INCEPTIONS)
        if self.architecture not in known:
            raise ValueError(f"no architecture {self.architecture!r} (there are {', '.join(known)})")
        if self.stride not in ("first", "middle"):
            raise ValueError(f"stride {self.stride!r}: 'first' or 'middle'")
        least = 75 if self.architecture in INCEPTIONS else 32
        if len(self.size) != 2 or min(self.size) < least:
            raise ValueError(f"size {self.size}: wanted width and height, {least} at least")

    @property
    def step(self) -> int:
        """Any side will do."""
        return 1

    @property
    def bare_step(self) -> int:
        """As with branches."""
        return self.step

    @property
    def scene(self) -> tuple[int, int]:
        """The whole image is seen at once."""
        return self.size

    @property
    def view(self) -> Literal["fit"]:
        """An image of another shape is fitted into ``size``."""
        return "fit"

    @property
    def branch_fields(self) -> tuple[str, ...]:
        """What shapes a branch and nothing else."""
        return "patch", "dim", "heads", "second_residual", "filters", "pool", "hidden", "dropout"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""
        return asdict(self)


class Layers(Stage):
    """Modules one after the other on the feature map."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Features) -> Features:
        return features.with_visual(self.layers(features.visual))


class ResidualPart(nn.Module):
    """Some consecutive convolutions of torchvision's ``BasicBlock`` or ``Bottleneck``, with their batch normalisation.

    A ReLU follows each but the block's last, whose sum with the shortcut has it.
    """

    def __init__(self, block: Any, first: int, end: int) -> None:
        super().__init__()
        pairs = [(block.conv1, block.bn1), (block.conv2, block.bn2)]
        if hasattr(block, "conv3"):  # a bottleneck
            pairs.append((block.conv3, block.bn3))
        layers: list[nn.Module] = []
        for index, (conv, norm) in enumerate(pairs[first:end], first):
            layers += [conv, norm]
            if index + 1 < len(pairs):
                layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


class ResNetPart(Stage):
    """A ResNet from within one residual block to within another: the paper's branches stand inside blocks.

    Between the two the record keeps the input of the block that is cut (``shortcut``), for its shortcut.

    Args:
        before: the rest of the block that the stage before has cut, and that block's shortcut.
        layers: whole layers.
        cut: the beginning of the block within which the stage ends.
    """

    def __init__(
        self,
        before: tuple[ResidualPart | None, nn.Module | None] | None,
        layers: Sequence[nn.Module],
        cut: ResidualPart | None,
    ) -> None:
        super().__init__()
        self.joins = before is not None
        self.rest, self.shortcut = before or (None, None)
        self.layers = nn.Sequential(*layers)
        self.cut = cut

    def forward(self, features: Features) -> Features:
        x, shortcut = features.visual, features.shortcut
        if self.joins:
            assert shortcut is not None
            if self.rest is not None:
                x = self.rest(x)
            x = F.relu(x + (shortcut if self.shortcut is None else self.shortcut(shortcut)))
        x = self.layers(x)
        return replace(
            features, visual=x if self.cut is None else self.cut(x), shortcut=None if self.cut is None else x
        )


def plain(architecture: str, stride: str = "middle") -> Any:
    """torchvision's model of that name with fresh weights; ``first`` moves a ResNet's strides."""
    import torchvision.models  # slow to import, and only wanted here
    from torchvision.models.resnet import Bottleneck

    # The second classifier of InceptionV3 is not the paper's, and images are normalised as all are here.
    own: dict[str, Any] = {"aux_logits": False, "init_weights": False} if architecture in INCEPTIONS else {}
    model: Any = torchvision.models.get_model(architecture, weights=None, **own)
    if stride == "first":
        for block in (module for module in model.modules() if isinstance(module, Bottleneck)):
            block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    return model


def _resnet(net: Any) -> list[Stage]:
    """Places: the first convolution that gives conv3's map, and the last one of conv3, before it joins the shortcut."""
    opening, *between, closing = net.layer2
    halves = next(i for i, conv in enumerate((opening.conv1, opening.conv2), 1) if conv.stride != (1, 1))
    begun, rest = ResidualPart(opening, 0, halves), ResidualPart(opening, halves, 3)
    stem = [net.conv1, net.bn1, net.relu, net.maxpool, net.layer1]
    return [
        ResNetPart(None, stem, begun),
        ResNetPart((rest, opening.downsample), between, ResidualPart(closing, 0, 3)),
        ResNetPart((None, closing.downsample), [net.layer3, net.layer4], None),
    ]


def _densenet(net: Any) -> list[Stage]:
    """Places: behind the first transition, and behind the second one's convolution, before it pools."""
    f = net.features
    second = f.transition2
    return [
        Layers(f.conv0, f.norm0, f.relu0, f.pool0, f.denseblock1, f.transition1),
        Layers(f.denseblock2, second.norm, second.relu, second.conv),
        Layers(second.pool, f.denseblock3, f.transition3, f.denseblock4, f.norm5, nn.ReLU(inplace=True)),
    ]


def _inception(net: Any) -> list[Stage]:
    """Places: the two concatenations that have 288 channels."""
    first = [net.Conv2d_1a_3x3, net.Conv2d_2a_3x3, net.Conv2d_2b_3x3, net.maxpool1]
    second = [net.Conv2d_3b_1x1, net.Conv2d_4a_3x3, net.maxpool2, net.Mixed_5b, net.Mixed_5c]
    middle = [net.Mixed_6a, net.Mixed_6b, net.Mixed_6c, net.Mixed_6d, net.Mixed_6e]
    last = [net.Mixed_7a, net.Mixed_7b, net.Mixed_7c]
    return [Layers(*first, *second), Layers(net.Mixed_5d), Layers(*middle, *last)]


class ClassifierHead(Exit):
    """The final exit: average over the map, then the paper's dense, dropout, dense → scores."""

    kind = "class"

    def __init__(self, channels: int, config: ConvNetConfig) -> None:
        super().__init__()
        c = config
        first = [nn.Linear(channels, c.top), nn.ReLU(), nn.Dropout(c.top_dropout)] if c.top else []
        self.layers = nn.Sequential(*first, nn.Linear(c.top or channels, c.outputs))

    def forward(self, features: Features) -> ExitOutput:
        return ExitOutput(self.layers(features.visual.mean((2, 3))).float())


class ConvNet(MultiExitNetwork):
    """A convolutional classifier with the paper's places ``1`` and ``2``.

    Attributes:
        published: this network's tensors' names → torchvision's.
    """

    config: ConvNetConfig
    classifies = True
    published_kinds = ("imagenet",)

    def __init__(self, config: ConvNetConfig | None = None) -> None:
        c = config or ConvNetConfig()
        theirs = plain(c.architecture, c.stride)
        if c.architecture in (*RESNETS, *BOTTLENECKS):
            stages = _resnet(theirs)
        elif c.architecture in DENSENETS:
            stages = _densenet(theirs)
        else:
            stages = _inception(theirs)
        top = theirs.classifier if c.architecture in DENSENETS else theirs.fc
        final = ClassifierHead(top.in_features, c)
        super().__init__(stages, final, {"1": 0, "2": 1}, c)
        names = {id(tensor): name for name, tensor in theirs.state_dict(keep_vars=True).items()}
        self.published = {
            name: names[id(tensor)] for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in names
        }
        self._maps = self._measure()
        self.torchvision_name = c.architecture

    def _measure(self) -> dict[str, tuple[int, int, int]]:
        """(channels, rows, columns) of the map at each place, from shapes alone: nothing is computed."""
        width, height = self.config.size
        features = inputs(torch.empty(1, 3, height, width, device="meta"))
        maps: dict[str, tuple[int, int, int]] = {}
        with torch.no_grad():
            for (place, _), stage in zip(self.places.items(), self.stages, strict=False):
                shapes = {name: torch.empty_like(t, device="meta") for name, t in stage.state_dict().items()}
                features = functional_call(stage, shapes, (features,))
                _, channels, rows, columns = features.visual.shape
                maps[place] = (channels, rows, columns)
        return maps

    def exit_location(self, place: str, config: ConvNetConfig) -> ExitLocation:
        """The feature map behind a stage."""
        c = config
        channels, rows, columns = self._maps[place]
        return ExitLocation(
            channels=channels,
            grid=(rows, columns),
            outputs=c.outputs,
            settings={
                **({"patch": c.patch} if c.patch else {}),
                **{"dim": c.dim, "heads": c.heads, "second_residual": c.second_residual},
                **{"filters": c.filters, "pool": c.pool, "padding": 0, "hidden": c.hidden, "dropout": c.dropout},
            },
        )


# The SL-ViT paper's three, and siblings of the first two that train from a few thousand images.
register_models(
    ConvNet,
    {
        "resnet152": ConvNetConfig("resnet152"),
        "densenet201": ConvNetConfig("densenet201"),
        "inceptionv3": ConvNetConfig("inception_v3"),
        "resnet18": ConvNetConfig("resnet18"),
        "densenet121": ConvNetConfig("densenet121"),
    },
)
