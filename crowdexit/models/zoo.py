"""Networks by name, their checkpoints and shipped weights.

A checkpoint is one safetensors file. Its header holds the network, its exits, the training record, and checksums of
itself and of the weights; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save as serialised
from torch import Tensor

from crowdexit.errors import CrowdExitError
from crowdexit.models.network import ActivationRange, MultiExitNetwork
from crowdexit.models.registry import models
from crowdexit.utils.checksum import checksum
from crowdexit.utils.files import atomic_write, write_problem
from crowdexit.utils.paths import PACKAGE, is_file

FORMAT = "crowdexit-2"
RANGES = "activation_ranges"  # in a checkpoint's meta: checksum of its weights
MAX_SIDE = 16_384
CALIBRATION = ("intervals", "temperatures", "familiarity")  # what `crowdexit calibrate` measures, in `Spec.meta`


class ZooError(CrowdExitError):
    """An unknown name, or an unusable checkpoint."""


@dataclass(frozen=True)
class ExitSpec:
    """An early exit: its name, location, kind, and own options."""

    name: str
    place: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """The description of a network, enough to build it without weights.

    Attributes:
        model: a name of the zoo.
        exits: early exits on it.
        changes: fields of the configuration that differ from the zoo's.
        meta: further data of the checkpoint (recipe, data, calibration …).
    """

    model: str
    exits: tuple[ExitSpec, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    meta: Mapping[str, Any] = field(default_factory=dict)


def build(spec: Spec) -> MultiExitNetwork:
    """A network with fresh weights.

    Raises:
        ZooError: for an unknown model, field of its configuration, place or kind.
    """
    model = models().get(spec.model)
    if model is None:
        raise ZooError(f"no model {spec.model!r} (there are {', '.join(names())})")
    try:
        changes = dict(spec.changes)
        changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
        network = model.make(replace(model.config, **changes))  # type: ignore[type-var]
        for e in spec.exits:
            network.add_branch(e.name, e.place, e.kind, e.options)
    except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError) as error:
        raise ZooError(f"{spec.model}: {str(error).partition(chr(10))[0]}") from None
    return network


def names() -> list[str]:
    """All model names."""
    return list(models())


def checkpoints_folder() -> Path:
    """Where the shipped weights lie: beside the package in a checkout, inside it in an installed wheel."""
    inside = PACKAGE / "checkpoints"
    return inside if inside.is_dir() else PACKAGE.parent / "checkpoints"


def shipped() -> list[str]:
    """The names whose weights come with the project."""
    return [name for name in names() if (checkpoints_folder() / name / "model.safetensors").is_file()]


def checkpoint_path(name: str | Path) -> Path:
    """The checkpoint of a shipped model's name, or of a path to a file or to a folder with one.

    Raises:
        ZooError: if there is none.
    """
    if str(name) in names():
        path = checkpoints_folder() / str(name) / "model.safetensors"
        if not path.is_file():
            raise ZooError(f"{name}: no weights are shipped for it (there are some for {', '.join(shipped())})")
        return path
    path = Path(name)
    if is_file(path / "model.safetensors"):
        path = path / "model.safetensors"
    if not is_file(path):
        raise ZooError(f"{name}: neither a model's name ({', '.join(names())}) nor a checkpoint")
    return path


def with_exits(network: MultiExitNetwork, spec: Spec, names: Sequence[str]) -> tuple[MultiExitNetwork, Spec]:
    """The same network with some of its early exits alone, in the order of the names.

    Raises:
        ZooError: for a name that is none of them, or comes twice.
    """
    there = {e.name: e for e in spec.exits}
    for name in names:
        if name not in there:
            raise ZooError(f"no early exit {name!r} in {spec.model} (it has {', '.join(there) or 'none'})")
    if len(set(names)) < len(names):
        raise ZooError("an exit is named twice")
    fewer = replace(spec, exits=tuple(there[name] for name in names))
    chosen = build(fewer)
    own = chosen.state_dict()
    fill(chosen, {key: tensor for key, tensor in network.state_dict().items() if key in own}, spec.model)
    chosen.activation_ranges = dict(network.activation_ranges)
    return chosen.eval(), fewer


def at_size(network: MultiExitNetwork, spec: Spec, size: tuple[int, int]) -> tuple[MultiExitNetwork, Spec]:
    """The same weights for images of another (width, height); its calibration is not of that size, and goes.

    At the size that the network has it stays as it is.

    Raises:
        ZooError: if some weights belong to the size that the network has.
    """
    if size == network.config.size:
        return network, spec
    other_spec = replace(
        spec,
        changes={**spec.changes, "size": list(size)},
        meta={key: value for key, value in spec.meta.items() if key not in CALIBRATION},
    )
    other, there = build(other_spec), network.state_dict()
    bound = [key for key, tensor in other.state_dict().items() if tensor.shape != there[key].shape]
    if bound:
        exits = dict.fromkeys(key.split(".")[1] for key in bound if key.startswith("branches."))
        what = f"only at its own size there is {', '.join(exits) or bound[0]}"
        hint = " (leave early exits out: --exits final)" if exits else ""
        raise ZooError(f"{spec.model} at {size[0]}x{size[1]}: {what}{hint}")
    fill(other, there, spec.model)
    other.activation_ranges = dict(network.activation_ranges)
    return other.eval(), other_spec


def step_of(network: MultiExitNetwork) -> int:
    """What the sides of its images have to be multiples of, at another size than its own."""
    return network.config.step if len(network.exit_names) > 1 else network.config.bare_step


def parse_size(text: str, step: int) -> tuple[int, int]:
    """``1024x576`` → (1024, 576).

    Raises:
        ZooError: if it is not two numbers, or they are not multiples of ``step`` up to 16,384.
    """
    match = re.fullmatch(r"([0-9]{1,6})[x×]([0-9]{1,6})", text.strip())
    if match is None:
        raise ZooError(f"size {text!r}: expected width and height like 1024x576")
    width, height = int(match[1]), int(match[2])
    if any(side % step or not 0 < side <= MAX_SIDE for side in (width, height)):
        raise ZooError(f"size {text!r}: width and height have to be multiples of {step}, {MAX_SIDE} at most")
    return width, height


def save(network: MultiExitNetwork, spec: Spec, path: Path, *, half: bool = False) -> None:
    """Write a checkpoint whole (beside, then renamed).

    Args:
        half: matrices and kernels as float16; vectors (biases, norms, running statistics) stay float32.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        tensors[name] = tensor.half() if half and tensor.dim() > 1 and tensor.is_floating_point() else tensor
    _write(tensors, spec, path)


def _write(tensors: dict[str, Tensor], spec: Spec, path: Path) -> None:
    header = {
        "format": FORMAT,
        "model": spec.model,
        "exits": json.dumps([vars(e) for e in spec.exits]),
        "changes": json.dumps(dict(spec.changes)),
        "meta": json.dumps(dict(spec.meta)),
        "weights_checksum": _weights_checksum(tensors),
    }
    data = serialised(tensors, metadata={**header, "checksum": _header_checksum(header)})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, len(data)) as part:
            part.write_bytes(data)
    except OSError as error:
        kept = "the existing file is unchanged" if path.is_file() else "nothing is written"
        raise ZooError(write_problem(path, error, needed=len(data), kept=kept)) from None


def _weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of tensors by their names, in the order of these: names, types, shapes and bytes."""
    parts: list[bytes | memoryview] = []
    for name, tensor in sorted(tensors.items()):
        parts.append(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return checksum(*parts)


def _header_checksum(header: Mapping[str, str]) -> str:
    return checksum(*(f"{key} {value}".encode() for key, value in sorted(header.items()) if key != "checksum"))


def annotate(path: Path, **meta: Any) -> None:
    """Change what a checkpoint says of itself, to the bit the same weights; whole, or not at all.

    Raises:
        ZooError: if it is no checkpoint, damaged, or cannot be written.
    """
    spec = read_spec(path)
    _write(_read_weights(path), replace(spec, meta={**spec.meta, **meta}), path)


def read_spec(path: Path) -> Spec:
    """The description in a checkpoint's header.

    Raises:
        ZooError: if the file is no checkpoint of this project, or its header is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except Exception as error:  # whatever the library makes of a damaged file
        raise ZooError(f"{path}: not a checkpoint, or damaged ({str(error).partition(chr(10))[0]})") from None
    if header.get("format") != FORMAT:
        raise ZooError(f"{path}: a safetensors file, but not a CrowdExit checkpoint of this version ({FORMAT})")
    if header.get("checksum") != _header_checksum(header):
        raise ZooError(f"{path}: the checkpoint's header is damaged (its checksum does not match)")
    try:
        exits, changes, meta = (json.loads(header[key]) for key in ("exits", "changes", "meta"))
        specs = tuple(ExitSpec(**e) for e in exits)
        texts = all(isinstance(text, str) for e in specs for text in (e.name, e.place, e.kind))
        texts = texts and all(isinstance(e.options, dict) for e in specs)
        if not (texts and isinstance(exits, list) and isinstance(changes, dict) and isinstance(meta, dict)):
            raise TypeError
        return Spec(header["model"], specs, changes, meta)
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ZooError(f"{path}: the checkpoint's header is damaged") from None


def load(name: str | Path) -> tuple[MultiExitNetwork, Spec]:
    """A network with its weights, in evaluation mode.

    Raises:
        ZooError: if there is no such checkpoint, or it does not fit the network that it names.
    """
    path = checkpoint_path(name)
    spec = read_spec(path)
    network = build(spec)
    fill(network, read_tensors(path), str(path))
    network.activation_ranges = _activation_ranges(network, spec, str(path))
    return network.eval(), spec


def _activation_ranges(network: MultiExitNetwork, spec: Spec, source: str) -> dict[str, ActivationRange]:
    """What a checkpoint has for int8, or nothing.

    Raises:
        ZooError: if it is damaged, or of another network.
    """
    layers = dict(network.named_modules())
    ranges: dict[str, ActivationRange] = {}
    try:
        for name, (low, high, steps, shifts) in spec.meta.get(RANGES, {}).items():
            ranges[name] = ActivationRange(float(low), float(high), int(steps), tuple(map(float, shifts)))
    except (AttributeError, TypeError, ValueError):
        raise ZooError(f"{source}: its activation ranges are damaged") from None
    for name, found in ranges.items():
        weight = getattr(layers.get(name), "weight", None)
        if weight is None or len(found.shifts) not in (0, len(weight)):
            raise ZooError(f"{source}: the activation range of {name!r} is of another network")
        if found.steps not in (127, 255) or not (
            -math.inf < found.low <= 0 < found.high < math.inf and all(map(math.isfinite, found.shifts))
        ):
            raise ZooError(f"{source}: the activation range of {name!r} is damaged")
    return ranges


def write_ranges(path: Path, ranges: Mapping[str, ActivationRange]) -> None:
    """Write activation ranges into a checkpoint, in place of any there.

    Raises:
        ZooError: if it is no checkpoint, damaged, or cannot be written.
    """
    annotate(path, **{RANGES: {name: (f.low, f.high, f.steps, f.shifts) for name, f in ranges.items()}})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, floats as float32.

    Raises:
        ZooError: if it is none, or damaged: its checksum does not match.
    """
    return {key: t.float() if t.is_floating_point() else t for key, t in _read_weights(path).items()}


def _read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint as they are stored, verified."""
    try:
        with safe_open(path, framework="pt") as file:
            expected = (file.metadata() or {}).get("weights_checksum")
            keys = file.keys()  # the file itself is not iterable
            tensors = {key: file.get_tensor(key) for key in keys}
    except Exception as error:  # whatever the library makes of a damaged file
        raise ZooError(f"{path}: not a checkpoint, or damaged ({str(error).partition(chr(10))[0]})") from None
    if expected != _weights_checksum(tensors):
        raise ZooError(f"{path}: the weights are damaged (their checksum does not match)")
    return tensors


def fill(
    network: torch.nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    optional: Callable[[str], bool] = lambda key: False,
) -> None:
    """Load tensors that have to fit; keys that ``optional`` accepts may be missing from the file.

    Raises:
        ZooError: naming the first key that is missing, left over, of another shape or not finite.
    """
    own = network.state_dict()
    missing: Sequence[str] = [k for k in own if k not in tensors and not optional(k)]
    extra = [k for k in tensors if k not in own]
    shapes = [k for k in own if k in tensors and own[k].shape != tensors[k].shape]
    for keys, what in (
        (missing, "it lacks"),
        (extra, "the network does not have"),
        (shapes, "it has another shape of"),
    ):
        if keys:
            raise ZooError(f"{source}: a checkpoint of another architecture: {what} {keys[0]!r}")
    for key, tensor in tensors.items():
        # NumPy's, for PyTorch's wakes its threads for every small tensor.
        if tensor.is_floating_point() and not np.isfinite(tensor.float().numpy()).all():
            raise ZooError(f"{source}: {key!r} is not finite")
    network.load_state_dict({k: tensors.get(k, own[k]) for k in own})
