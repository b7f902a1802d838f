"""Published weights into the backbones, by the names that their own projects gave them.

Nothing is unpickled: ``.pth`` files are read as tensors only.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from crowdexit.data.views import MEAN, STD
from crowdexit.errors import CrowdExitError
from crowdexit.models.backbones.audiocsrnet import STRIDE, AudioCSRNet, FusionBlock
from crowdexit.models.backbones.convnets import BOTTLENECKS, INCEPTIONS, ConvNet
from crowdexit.models.backbones.efficientnet import LitePyramid, LiteStem
from crowdexit.models.backbones.vgg import VGGFront, VGGish
from crowdexit.models.backbones.vit import Embedding, Encoder, ViT
from crowdexit.models.backbones.yamnet import YAMNet
from crowdexit.models.network import MultiExitNetwork

TORCHVISION = "torchvision"
TIMM = "timm"
_HU_SCALE = 100.0  # the output of the published AudioCSRNet (Hu et al.) for one head

_OLD_DENSENET = re.compile(r"(\.(?:norm|conv))\.([12]\.)")

Tensors = Mapping[str, Tensor]


class WeightsError(CrowdExitError):
    """A file of weights that cannot be read, or that is not what it is said to be."""


@dataclass(frozen=True)
class Filled:
    """What a file gave to a network.

    Attributes:
        kind: of the weights. source: the file, or ``torchvision`` or ``timm``.
        filled: the network's tensors that now come from the file.
        unused: the file's tensors that the network does not have.
    """

    kind: str
    source: str
    filled: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind} from {self.source}: {len(self.filled)} tensors filled, {len(self.unused)} unused"


def apply_weights(network: MultiExitNetwork, mapping: Mapping[str, str | Path]) -> list[Filled]:
    """Fill a network from several published files: kind → path, in the order given (later ones win).

    Raises:
        WeightsError: as :func:`load_published`.
    """
    return [load_published(network, kind, path) for kind, path in mapping.items()]


def load_published(network: MultiExitNetwork, kind: str, path: str | Path) -> Filled:
    """Fill what a published file has of a network; on an error nothing is changed.

    Kinds:

    - ``vgg16``: torchvision's VGG-16 (``features.N.…``) → the VGG front. ``torchvision`` in place of a path
      has torchvision fetch its ImageNet weights.
    - ``vggish``: the published ``pytorch_vggish.pth`` (``features.N.…``) → VGGish's six convolutions.
    - ``efficientnet-lite0``: timm's ``tf_efficientnet_lite0`` → the EfficientNet-Lite0 front, without the join of its
      strides. ``timm`` in place of a path has timm fetch its ImageNet weights.
    - ``yamnet``: YAMNet (``conv.…``, ``bn.…``, ``blockN.depthwise.…``; batch normalisation without scale) → the YAMNet
      audio encoder, without the projection of its embedding.
    - ``csrnet``: a CSRNet (Li et al., ``frontend.N.…``) → the VGG front. Its back end has no batch normalisation
      and no audio, and stays unused.
    - ``audiocsrnet``: a checkpoint of Hu et al.'s code → all but the vector that stands in for absent sound. The
      network has to normalise images as that code does (``image_norm: official``); its output of 100 a head moves into
      the last convolution.
    - ``vit``: timm's or DeiT's vision transformer → patch embedding and encoders; a classifier's last layer too,
      where it has as many classes. Positions of another image size are resampled. DeiT's images are normalised
      as all are here.
    - ``augreg``: the same of timm's own ViTs, whose images go from -1 to 1: that moves into the patch embedding.
    - ``transcrowd``: a checkpoint of the official TransCrowd, of the same variant → all.
    - ``imagenet``: torchvision's ResNet, DenseNet or InceptionV3 → all but the top; that too, where it is one dense
      layer (``top: 0``) with as many classes. ``torchvision`` in place of a path has torchvision fetch its ImageNet
      weights. Its ResNets halve their maps in the 3×3 (``stride: middle``). Its InceptionV3 takes images from -1
      to 1: that moves into the first convolution.

    Raises:
        WeightsError: an unknown kind or one of another network, an unreadable file, or a tensor that is missing,
            not finite or of another shape.
    """
    if kind not in _KINDS:
        raise WeightsError(f"no published weights of kind {kind!r} (there are {', '.join(_KINDS)})")
    if kind not in network.published_kinds:
        fitting = ", ".join(network.published_kinds) or "none"
        raise WeightsError(f"{kind}: not weights for this network, {type(network).__name__} (there are {fitting})")
    if problem := network.published_problem(kind):
        raise WeightsError(problem)
    fetch = _FETCHED.get((kind, str(path)))
    tensors = fetch(network) if fetch is not None else read_published(path)
    reader = _Reader(tensors, f"{kind}: {path}")
    new = _KINDS[kind](network, reader)
    own = network.state_dict()
    with torch.no_grad():
        for key, tensor in new.items():
            own[key].copy_(tensor)
    return Filled(kind, str(path), tuple(new), reader.unused())


def read_published(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.pth``/``.pth.tar`` or ``.safetensors`` file, by name.

    A training checkpoint's ``state_dict``, ``net`` or ``model`` is taken out, and the prefixes of wrapping modules
    (``module.``, and ``CCN.`` of Hu et al.'s code) are dropped.

    Raises:
        WeightsError: no such file, damaged, more than tensors in it, or none.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error):
            raise WeightsError(f"{path}: refused: reading it would run code that is stored in it") from None
        raise WeightsError(f"{path}: not a file of weights, or a damaged one") from None
    except Exception:  # a damaged pickle fails in every way there is
        raise WeightsError(f"{path}: not a file of weights, or a damaged one") from None
    for wrapper in ("state_dict", "net", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {_bare(key): t for key, t in content.items() if isinstance(key, str) and isinstance(t, Tensor)}
    if not tensors:
        raise WeightsError(f"{path}: no weights in it")
    return tensors


def _bare(key: str) -> str:
    while key.startswith(("module.", "CCN.")):
        key = key.partition(".")[2]
    return key


def _torchvision(network: MultiExitNetwork) -> Tensors:
    """torchvision's first ImageNet weights: of VGG-16, or of the network's own architecture."""
    from torchvision.models import get_model_weights  # slow to import, and only wanted here

    name = network.torchvision_name
    try:
        published = get_model_weights(name)["IMAGENET1K_V1"]
        weights: dict[str, Tensor] = published.get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{name}: torchvision could not fetch its weights ({reason}); use a file instead") from None
    return weights


def _timm(network: MultiExitNetwork) -> Tensors:
    """timm's ImageNet weights of EfficientNet-Lite0."""
    import timm  # slow to import, and only wanted here

    name = "tf_efficientnet_lite0"
    try:
        weights: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # its hub's client has errors of its own, and not one base class for them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(f"{name}: timm could not fetch its weights ({reason}); use a file instead") from None
    return weights


class _Reader:
    """Hands out a file's tensors by name, checked, and remembers which nobody asked for."""

    def __init__(self, tensors: Tensors, source: str) -> None:
        self.tensors = dict(tensors)
        self.source = source
        self.requested: set[str] = set()

    def take(self, key: str, shape: torch.Size) -> Tensor:
        if key not in self.tensors:
            raise WeightsError(f"{self.source}: it lacks {key!r}")
        tensor = self.tensors[key]
        if tensor.shape != shape:
            raise WeightsError(f"{self.source}: {key!r} is {_by(tensor.shape)}, wanted {_by(shape)}")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{self.source}: {key!r} is not finite")
        self.requested.add(key)
        return tensor.float()

    def unused(self) -> tuple[str, ...]:
        return tuple(key for key in self.tensors if key not in self.requested)


def _by(shape: torch.Size) -> str:
    return "×".join(map(str, shape)) or "one number"


def _convolutions(network: AudioCSRNet, stage: type[nn.Module], reader: _Reader, prefix: str) -> dict[str, Tensor]:
    """A front's convolutions; without batch normalisation the layers' numbers are the published ones."""
    return _renamed(network, {f"stages.{_index(network, stage, reader)}.layers.": prefix}, reader)


def _index(network: AudioCSRNet, stage: type[nn.Module], reader: _Reader) -> int:
    """Where the network's stage of that class stands."""
    for index, module in enumerate(network.stages):
        if isinstance(module, stage):
            return index
    raise WeightsError(f"{reader.source}: this network has no {stage.__name__} (another front or audio_encoder)")


def _renamed(network: AudioCSRNet, prefixes: Mapping[str, str], reader: _Reader) -> dict[str, Tensor]:
    """What the file has for the network's tensors whose names begin like this: our prefix → theirs."""
    new = {}
    for key, tensor in network.state_dict().items():
        for ours, theirs in prefixes.items():
            # How many batches a normalisation has seen says nothing of the network, and older files lack it.
            if key.startswith(ours) and not key.endswith("num_batches_tracked"):
                new[key] = reader.take(theirs + key.removeprefix(ours), tensor.shape)
    return new


def _vgg16(network: AudioCSRNet, reader: _Reader) -> dict[str, Tensor]:
    return _convolutions(network, VGGFront, reader, "features.")


def _vggish(network: AudioCSRNet, reader: _Reader) -> dict[str, Tensor]:
    return _convolutions(network, VGGish, reader, "features.")


def _efficientnet_lite0(network: AudioCSRNet, reader: _Reader) -> dict[str, Tensor]:
    stem, pyramid = _index(network, LiteStem, reader), _index(network, LitePyramid, reader)
    prefixes = {f"stages.{stem}.{part}.": f"{part}." for part in ("conv_stem", "bn1", "blocks")}
    number = len(network.stages[stem].blocks)  # type: ignore[arg-type]
    for part in ("to_16", "to_32"):
        for index in range(len(network.stages[pyramid].get_submodule(part))):  # type: ignore[arg-type]
            prefixes[f"stages.{pyramid}.{part}.{index}."] = f"blocks.{number}."
            number += 1
    return _renamed(network, prefixes, reader)


def _yamnet(network: AudioCSRNet, reader: _Reader) -> dict[str, Tensor]:
    index = _index(network, YAMNet, reader)
    own = f"stages.{index}."
    prefixes = {f"{own}conv.": "conv.", f"{own}bn.": "bn."}
    for number, _ in enumerate(network.stages[index].blocks):  # type: ignore[arg-type]
        prefixes[f"{own}blocks.{number}."] = f"block{number + 1}."
    # Its batch normalisation has no scale, ours has one of 1.
    for key, bias in list(reader.tensors.items()):
        if key.endswith("bn.bias"):
            reader.tensors.setdefault(key.removesuffix("bias") + "weight", torch.ones_like(bias))
    return _renamed(network, prefixes, reader)


def _csrnet(network: AudioCSRNet, reader: _Reader) -> dict[str, Tensor]:
    return _convolutions(network, VGGFront, reader, "frontend.")


def _audiocsrnet(network: AudioCSRNet, reader: _Reader) -> dict[str, Tensor]:
    new = _convolutions(network, VGGFront, reader, "frontend.")
    new |= _convolutions(network, VGGish, reader, "audio_vgg.features.")
    blocks = [(name, module) for name, module in network.named_modules() if isinstance(module, FusionBlock)]
    for i, (name, block) in enumerate(blocks):
        # Theirs is a plain Sequential: convolution 3i with a bias, batch normalisation 3i + 1 without γ and β, ReLU.
        channels = block.norm.bias.shape
        new[f"{name}.conv.weight"] = reader.take(f"backend.{3 * i}.weight", block.conv.weight.shape)
        bias = reader.take(f"backend.{3 * i}.bias", channels)
        # A bias before batch normalisation only shifts the running mean.
        new[f"{name}.norm.running_mean"] = reader.take(f"backend.{3 * i + 1}.running_mean", channels) - bias
        new[f"{name}.norm.running_var"] = reader.take(f"backend.{3 * i + 1}.running_var", channels)
        new[f"{name}.norm.weight"] = torch.ones(channels)
        new[f"{name}.norm.bias"] = torch.zeros(channels)
        for part in ("weight", "bias"):
            shape = getattr(block.fuse.linear, part).shape
            new[f"{name}.fuse.linear.{part}"] = reader.take(f"fully_connected.{i}.{part}", shape)
    # Their map is enlarged by repetition, so that each cell counts once for each of its pixels.
    scale = network.config.density_scale * STRIDE**2 / _HU_SCALE
    for part in ("weight", "bias"):
        shape = getattr(network.final.conv, part).shape
        new[f"final.conv.{part}"] = reader.take(f"output_layer.{part}", shape) * scale
    known = ("audio_vgg.fc.", "audio_vgg.embeddings.")
    for key in reader.unused():
        if not key.startswith(known) and not key.endswith("num_batches_tracked"):
            raise WeightsError(f"{reader.source}: another architecture than AudioCSRNet: it has {key!r}")
    return new


def _renormalise(new: dict[str, Tensor], layer: str, its_mean: Tensor, its_std: Tensor) -> None:
    """Have a first convolution without padding that was trained on another normalisation take ImageNet's instead."""
    weight, bias = new[layer + "weight"], new[layer + "bias"]  # O×3×k×k, O
    mean, std = torch.from_numpy(MEAN), torch.from_numpy(STD)
    shift = (mean - its_mean) / its_std
    new[layer + "bias"] = bias + (weight.sum((2, 3)) * shift).sum(1)
    new[layer + "weight"] = weight * (std / its_std)[:, None, None]


def _encoders(network: ViT, reader: _Reader) -> dict[str, Tensor]:
    """Patch embedding and encoders by timm's names."""
    from timm.layers import resample_abs_pos_embed

    new: dict[str, Tensor] = {}
    layer = 0
    for index, stage in enumerate(network.stages):
        if not isinstance(stage, Encoder):
            continue
        if isinstance(stage.embedding, Embedding):
            own = f"stages.{index}.embedding."
            for key in ("patch_embed.proj.weight", "patch_embed.proj.bias", "cls_token"):
                new[own + key] = reader.take(key, stage.embedding.get_parameter(key).shape)
            published = reader.tensors.get("pos_embed")
            shape = stage.embedding.pos_embed.shape if published is None else published.shape
            if len(shape) != 3 or shape[2] != network.config.dim or not _is_square(shape[1] - 1):
                raise WeightsError(f"{reader.source}: 'pos_embed' is {_by(shape)}, no square of positions")
            positions = reader.take("pos_embed", shape)
            new[own + "pos_embed"] = resample_abs_pos_embed(positions, list(network.config.grid))
        for key, tensor in stage.block.state_dict().items():
            new[f"stages.{index}.block.{key}"] = reader.take(f"blocks.{layer}.{key}", tensor.shape)
        layer += 1
    for part in ("weight", "bias"):
        new[f"final.norm.{part}"] = reader.take(f"norm.{part}", getattr(network.final.norm, part).shape)
    return new


def _is_square(number: int) -> bool:
    return number > 0 and round(number**0.5) ** 2 == number


def _vit(network: ViT, reader: _Reader) -> dict[str, Tensor]:
    new = _encoders(network, reader)
    head = reader.tensors.get("head.weight")
    if network.config.task == "class" and head is not None and len(head) == network.config.outputs:
        for part in ("weight", "bias"):
            new[f"final.head.{part}"] = reader.take(f"head.{part}", getattr(network.final.head, part).shape)
    return new


def _augreg(network: ViT, reader: _Reader) -> dict[str, Tensor]:
    """timm's own ViTs, whose images go from -1 to 1, where DeiT's are normalised as ImageNet's are."""
    new = _vit(network, reader)
    first = f"stages.{network.places['1']}.embedding.patch_embed.proj."
    _renormalise(new, first, torch.full((3,), 0.5), torch.full((3,), 0.5))
    return new


def _transcrowd(network: ViT, reader: _Reader) -> dict[str, Tensor]:
    # Theirs → ours; the GAP variant keeps a ``head`` that it does not use.
    names = {
        "token": {"head": "layers.0", "output1.2": "layers.3"},
        "gap": {"output1.1": "layers.1", "output1.4": "layers.4"},
        "class": {},
    }[network.config.task]
    if not names:
        raise WeightsError(f"{reader.source}: TransCrowd counts, this network classifies")
    new = _encoders(network, reader)
    for theirs, ours in names.items():
        for part in ("weight", "bias"):
            shape = network.final.get_parameter(f"{ours}.{part}").shape
            new[f"final.{ours}.{part}"] = reader.take(f"{theirs}.{part}", shape)
    last = list(names.values())[-1]
    for part in ("weight", "bias"):  # their output is the count itself
        new[f"final.{last}.{part}"] = new[f"final.{last}.{part}"] / network.config.count_scale
    return new


def _imagenet(network: ConvNet, reader: _Reader) -> dict[str, Tensor]:
    c = network.config
    if c.architecture in BOTTLENECKS and c.stride == "first":
        raise WeightsError(f"{reader.source}: torchvision's weights are for a stride in the middle (stride: middle)")
    # The files of DenseNet are older than its code: norm.1, conv.2 for norm1, conv2.
    reader.tensors = {_OLD_DENSENET.sub(r"\1\2", key): tensor for key, tensor in reader.tensors.items()}
    own = network.state_dict()
    counted = "num_batches_tracked"  # says nothing of the network, and older files lack it
    new = {
        name: reader.take(theirs, own[name].shape)
        for name, theirs in network.published.items()
        if not name.endswith(counted)
    }
    top = "classifier" if "classifier.weight" in reader.tensors else "fc"
    scores = reader.tensors.get(f"{top}.weight")
    if not c.top and scores is not None and len(scores) == c.outputs:
        for part in ("weight", "bias"):
            new[f"final.layers.0.{part}"] = reader.take(f"{top}.{part}", own[f"final.layers.0.{part}"].shape)
    if c.architecture in INCEPTIONS:
        first = "stages.0.layers.0."
        weight = new[first + "conv.weight"]  # O×3×3×3
        mean, std = torch.from_numpy(MEAN), torch.from_numpy(STD)
        # No bias, but no padding either: what the other mean adds is the same everywhere, and moves the running mean.
        added = (weight.sum((2, 3)) * (mean - 0.5) / 0.5).sum(1)
        new[first + "bn.running_mean"] = new[first + "bn.running_mean"] - added
        new[first + "conv.weight"] = weight * (std / 0.5)[:, None, None]
    return new


_KINDS: dict[str, Callable[[Any, _Reader], dict[str, Tensor]]] = {
    "vgg16": _vgg16,
    "vggish": _vggish,
    "efficientnet-lite0": _efficientnet_lite0,
    "yamnet": _yamnet,
    "csrnet": _csrnet,
    "audiocsrnet": _audiocsrnet,
    "vit": _vit,
    "augreg": _augreg,
    "transcrowd": _transcrowd,
    "imagenet": _imagenet,
}
# What a word in place of a file has somebody else fetch.
_FETCHED: dict[tuple[str, str], Callable[[MultiExitNetwork], Tensors]] = {
    ("vgg16", TORCHVISION): _torchvision,
    ("imagenet", TORCHVISION): _torchvision,
    ("efficientnet-lite0", TIMM): _timm,
}
