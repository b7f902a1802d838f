"""Vision transformers (arXiv 2010.11929) as a chain: one encoder layer a stage, a place for branches after each.

With timm's blocks and timm's names of tensors, so that its weights fit: counting by TransCrowd (arXiv 2104.09116)
in both variants, and the ViT-B/16 classifier.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from crowdexit.models.backbones.vgg import VGG_FRONT, VGGish, conv_chain
from crowdexit.models.exits.head import as_answer
from crowdexit.models.exits.registry import ExitLocation
from crowdexit.models.exits.tokens import attend, encoder_layer
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.registry import register_models
from crowdexit.models.stages import Exit, ExitOutput, Features, Stage

_Norm = partial(nn.LayerNorm, eps=1e-6)


@dataclass(frozen=True)
class ViTConfig:
    """Everything that shapes a vision transformer and its branches. The defaults are TransCrowd's, token variant.

    Attributes:
        size: (width, height) of one view in pixels, multiples of ``patch``.
        task: ``token`` and ``gap`` count (TransCrowd's two heads), ``class`` tells classes apart.
        outputs: classes; 1 for a count.
        dim, depth, heads: of the encoder.
        patch: side of a patch in pixels.
        stem: ``patch``, one convolution of a patch's size, or ``conv``, as many of 3×3 and stride 2 with batch
            normalisation as halve a patch to a pixel, which needs far fewer images to learn from, or ``vgg``, the
            first seven convolutions of AudioCSRNet's front and one more of stride 2, which can start from weights
            that know crowds.
        stem_width: of the VGG stem.
        view: how an image of another shape is seen: ``tiles``, cut into views that are counted as one batch and
            added (TransCrowd's protocol), or ``fit``, the whole image in one view.
        audio_width: width of a VGGish before the chain, for the branches that hear; 0: deaf.
        count_scale: a count per unit of a head's output.
        hidden, dropout: of the branches' MLP heads.
        slvit_dim, slvit_heads: of the SL-ViT branches. filters: of the CNN branches. latents: of the Perceiver's.
        resmlp_shift: the β of the second affine in ResMLP-EE's equation (4a); False: none, as in checkpoints that were
            trained before there was one.

    Raises:
        ValueError: for a size that patches do not divide, or a width that the heads do not.
    """

    size: tuple[int, int] = (384, 384)
    task: Literal["token", "gap", "class"] = "token"
    outputs: int = 1
    dim: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    stem: Literal["patch", "conv", "vgg"] = "patch"
    stem_width: float = 0.5
    view: Literal["tiles", "fit"] = "tiles"
    audio_width: float = 0.0
    count_scale: float = 1.0
    hidden: int = 256
    dropout: float = 0.5
    slvit_dim: int = 32
    slvit_heads: int = 12
    filters: int = 16
    latents: int = 16
    resmlp_shift: bool = True

    def __post_init__(self) -> None:
        if self.patch < 1 or (self.stem == "conv" and self.patch.bit_count() != 1):
            raise ValueError(f"a patch of {self.patch} pixels: above zero, and a power of two for convolutions")
        if self.stem == "vgg" and self.patch != 16:
            raise ValueError(f"a patch of {self.patch} pixels: the VGG stem makes patches of 16")
        if len(self.size) != 2 or any(side <= 0 or side % self.patch for side in self.size):
            raise ValueError(f"size {self.size}: wanted width and height, multiples of {self.patch}")
        if self.dim % self.heads:
            raise ValueError(f"{self.heads} heads do not divide {self.dim} channels")
        if self.task != "class" and self.outputs != 1:
            raise ValueError(f"a count is one output, not {self.outputs}")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.size[1] // self.patch, self.size[0] // self.patch

    @property
    def step(self) -> int:
        """Sides are multiples of a patch."""
        return self.patch

    @property
    def bare_step(self) -> int:
        """As with branches."""
        return self.step

    @property
    def scene(self) -> tuple[int, int]:
        """(width, height) at which an image is looked at in all: one view, or three by two tiles (TransCrowd)."""
        return (3 * self.size[0], 2 * self.size[1]) if self.view == "tiles" else self.size

    @property
    def branch_fields(self) -> tuple[str, ...]:
        """What shapes a branch and nothing else."""
        return "slvit_dim", "slvit_heads", "filters", "latents", "resmlp_shift", "hidden", "dropout"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""
        return asdict(self)


def conv_stem(dim: int, patch: int) -> nn.Sequential:
    """3×3 convolutions of stride 2 with batch normalisation, B×3×H×W → B×dim×H/patch×W/patch (Xiao et al. 2021).

    Each has half of the next one's channels.
    """
    from timm.models.levit import ConvNorm  # timm takes as long to import as PyTorch, and only transformers use it

    layers: list[nn.Module] = []
    channels = 3
    halvings = patch.bit_length() - 1
    for left in reversed(range(halvings)):
        layers += [ConvNorm(channels, dim >> left, 3, stride=2, padding=1), nn.GELU()]
        channels = dim >> left
    return nn.Sequential(*layers[:-1])


def vgg_stem(dim: int, width: float) -> nn.Sequential:
    """VGG-16 up to its third pooling, then a 3×3 convolution of stride 2: B×3×H×W → B×dim×H/16×W/16."""
    from timm.models.levit import ConvNorm

    front = conv_chain(VGG_FRONT[:10], 3, width, norm=True)
    return nn.Sequential(front, ConvNorm(round(256 * width), dim, 3, stride=2, padding=1))


class Embedding(Stage):
    """Image B×3×H×W → tokens B×(1+N)×D: patches projected, the classification token before them, positions."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.token_grid = config.grid
        self.patch_embed: nn.Module
        if config.stem == "conv":
            self.patch_embed = conv_stem(config.dim, config.patch)
        elif config.stem == "vgg":
            self.patch_embed = vgg_stem(config.dim, config.stem_width)
        else:
            from timm.layers import PatchEmbed

            size = config.size[1], config.size[0]
            self.patch_embed = PatchEmbed(size, config.patch, embed_dim=config.dim, flatten=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.token_grid[0] * self.token_grid[1], config.dim))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, features: Features) -> Features:
        patches = self.patch_embed(features.visual).flatten(2).transpose(1, 2)  # B×N×D
        first = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
        visual = torch.cat([first, patches], dim=1) + self.pos_embed
        return features.with_tokens(visual, self.token_grid)


class Encoder(Stage):
    """One encoder layer of ViT (pre-norm), behind the embedding if it is the first."""

    def __init__(self, config: ViTConfig, embedding: Embedding | None = None) -> None:
        super().__init__()
        self.embedding = embedding
        self.block = encoder_layer(config.dim, config.heads)

    def forward(self, features: Features) -> Features:
        if self.embedding is not None:
            features = self.embedding(features)
        return features.with_visual(attend(self.block, features.visual))


class TokenHead(Exit):
    """TransCrowd's token variant: classification token → linear 1000 → ReLU → dropout → linear → count."""

    kind = "token"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm = _Norm(config.dim)
        self.scale = config.count_scale
        self.layers = nn.Sequential(nn.Linear(config.dim, 1000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(1000, 1))

    @property
    def count_head(self) -> nn.Sequential:
        return self.layers

    def tokens(self, features: Features) -> Tensor:
        """What the head sees, B×1×D."""
        token: Tensor = self.norm(features.tokens()[:, :1])
        return token

    def forward(self, features: Features) -> ExitOutput:
        return ExitOutput(as_answer(self.layers(self.tokens(features)[:, 0]).float()) * self.scale)


class GapHead(Exit):
    """TransCrowd's GAP variant: each patch token averaged to 48 values, all flattened, ReLU, 128, ReLU, count."""

    kind = "gap"
    VALUES = 48

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm = _Norm(config.dim)
        self.scale = config.count_scale
        cells = config.grid[0] * config.grid[1]
        self.pool = nn.AdaptiveAvgPool1d(self.VALUES)
        self.layers = nn.Sequential(
            nn.ReLU(), nn.Linear(cells * self.VALUES, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 1)
        )

    def forward(self, features: Features) -> ExitOutput:
        patches = self.norm(features.tokens())[:, 1:]
        return ExitOutput(as_answer(self.layers(self.pool(patches).flatten(1)).float()) * self.scale)


class ClassHead(Exit):
    """ViT's classifier: normalisation, one linear layer on the classification token → scores."""

    kind = "class"

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm = _Norm(config.dim)
        self.head = nn.Linear(config.dim, config.outputs)

    def forward(self, features: Features) -> ExitOutput:
        return ExitOutput(self.head(self.norm(features.tokens()[:, 0])).float())


class ViT(MultiExitNetwork):
    """A vision transformer with a place for branches after each encoder layer but the last: ``1`` … ``11``.

    The stages are patch embedding and encoder 1, encoder 2, …, encoder 12; a network that hears has a VGGish
    before them, whose vector the branches ``slvit-audio`` take.
    """

    config: ViTConfig
    published_kinds = ("vit", "augreg", "transcrowd")

    def __init__(self, config: ViTConfig | None = None) -> None:
        c = config or ViTConfig()
        ears = [VGGish(c.audio_width, norm=True)] if c.audio_width else []
        encoders = [Encoder(c, Embedding(c)), *(Encoder(c) for _ in range(c.depth - 1))]
        heads: dict[str, type[Exit]] = {"token": TokenHead, "gap": GapHead, "class": ClassHead}
        final = cast(Any, heads[c.task])(c)
        places = {str(layer): layer - 1 + len(ears) for layer in range(1, c.depth)}
        super().__init__([*ears, *encoders], final, places, c)
        self._audio = ears[0].channels if ears else 0
        self.classifies, self.token_dim = c.task == "class", c.dim
        self.parts_of_audiocsrnet = {
            **({"stages.0.": "stages.1."} if ears else {}),
            **({f"stages.{len(ears)}.embedding.patch_embed.0.": "stages.0.layers."} if c.stem == "vgg" else {}),
        }
        for module in encoders:
            module.apply(_start)

    def published_problem(self, kind: str) -> str | None:
        """Why published weights of a kind do not fit this configuration, or None."""
        if self.config.stem != "patch":
            return f"{kind}: published weights fit no network with a stem of convolutions"
        return None

    def exit_location(self, place: str, config: ViTConfig) -> ExitLocation:
        """The tokens behind an encoder layer."""
        c = config
        return ExitLocation(
            channels=c.dim,
            grid=c.grid,
            tokens=True,
            audio=self._audio,
            heads=c.heads,
            outputs=c.outputs,
            settings={
                **{"dim": c.slvit_dim, "heads": c.slvit_heads, "filters": c.filters, "latents": c.latents},
                **{"shift": c.resmlp_shift, "hidden": c.hidden, "dropout": c.dropout, "scale": c.count_scale},
            },
        )


def _start(module: nn.Module) -> None:
    """timm's start of a ViT: truncated normal of 0.02 for linear layers, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# ViT-B, ViT-S and ViT-Ti of timm; what trains from scratch has a stem of convolutions, and an audio encoder. The
# smallest has the convolutions of audiocsrnet-s.
_M: dict[str, Any] = {"dim": 384, "heads": 6, "stem": "conv", "audio_width": 0.25, "count_scale": 100.0}
_S: dict[str, Any] = {"dim": 192, "heads": 3, "stem": "vgg", "audio_width": 0.25, "count_scale": 100.0}
register_models(
    ViT,
    {
        "transcrowd-token": ViTConfig(),
        "transcrowd-token-m": ViTConfig(**_M),
        "transcrowd-token-s": ViTConfig(**_S, hidden=64, slvit_dim=16, filters=8),
        "transcrowd-gap": ViTConfig(task="gap"),
        "transcrowd-gap-m": ViTConfig(task="gap", **_M),
        "transcrowd-gap-s": ViTConfig(task="gap", **_S, hidden=64, slvit_dim=16, filters=8),
        "vit-b16": ViTConfig(task="class", outputs=10),
        "vit-s16": ViTConfig(task="class", outputs=10, dim=384, heads=6),
        "vit-ti16": ViTConfig(task="class", outputs=10, dim=192, heads=3),
    },
)
