"""The cost of each exit, from the stages and branches of a network, without computing anything.

The network is built and run on torch's meta device, where tensors have shapes but no data, which takes no memory.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from crowdexit.errors import CrowdExitError
from crowdexit.models import zoo
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.scenarios import branch_options, classes_of
from crowdexit.models.stages import Features, inputs


class CostError(CrowdExitError):
    """A branch, exit location or data set that the model does not have."""


@dataclass(frozen=True)
class ExitCost:
    """The cost of one early exit.

    Attributes:
        exit: its location (``V1`` …).
        kind: of the branch (``cnn``, ``slvit``).
        branch_params: parameters of the branch alone.
        total_flops: of the stages up to its location, and of the branch.
        total_macs: multiply-adds, half of ``total_flops``.
        speedup: FLOPS of the backbone / ``total_flops``.
    """

    exit: str
    kind: str
    branch_params: int
    total_flops: int
    total_macs: int
    speedup: float


@dataclass(frozen=True)
class CostTable:
    """The cost of a model's exits for one image and one second of audio.

    Attributes:
        model: name or path, as requested.
        size: of the image, ``WIDTHxHEIGHT`` in pixels.
        backbone_flops: of all stages and the final exit, no branches.
        exits: in the order of their locations.
    """

    model: str
    size: str
    backbone_flops: int
    exits: tuple[ExitCost, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what ``crowdexit cost --format json`` prints."""
        return {**asdict(self), "exits": [asdict(e) for e in self.exits]}

    def rows(self) -> list[tuple[str, ...]]:
        """The table in the units of the papers: exit, kind, parameters, FLOPS, multiply-adds, speedup."""
        return [
            (
                e.exit,
                e.kind,
                f"{e.branch_params / 1e6:.2f}M",
                f"{e.total_flops / 1e9:.2f}B",
                f"{e.total_macs / 1e9:.2f}B",
                f"{e.speedup:.2f}",
            )
            for e in self.exits
        ]


def cost(
    model: str | Path,
    *,
    branch: str | None = None,
    layer: str | None = None,
    size: str | None = None,
    dataset: str | None = None,
) -> CostTable:
    """What every early exit that the model can have costs (tables IV to VIII of the SL-ViT paper).

    Those that a checkpoint has are counted with their own options.

    FLOPS are two for each multiply-add of convolutions, dense layers and attention's own two products, up to
    and including the branch; what is linear in the features (norms, activations, pooling) is not counted.

    Args:
        model: a name of the zoo, or the path of a checkpoint.
        branch: this kind only.
        layer: this exit location only.
        size: another image size, ``WIDTHxHEIGHT``.
        dataset: of a classifier: as many classes, and the branches' shapes of the paper's scenario.

    Raises:
        CrowdExitError: for an unknown model, branch kind, location, size or data set.
    """
    described = _spec(model)
    trained = {(e.place, e.kind): e.options for e in described.exits}  # they may differ from the model's defaults
    spec = replace(described, exits=())
    with torch.device("meta"):
        if dataset is not None:
            spec = replace(spec, changes={**spec.changes, "outputs": classes_of(dataset)})
            if not zoo.build(spec).classifies:
                raise CostError(f"{spec.model} counts; a data set of classes is for classifiers")
        if size is not None:
            step = zoo.build(spec).config.step
            spec = replace(spec, changes={**spec.changes, "size": zoo.parse_size(size, step)})
        network = zoo.build(spec).eval()
        exits = []
        for place in _chosen(layer, tuple(network.places), f"no exit location {layer!r} in {spec.model}"):
            there = network.branch_kinds(place)
            for kind in _chosen(branch, there, f"no branch kind {branch!r} fits {spec.model}"):
                options = trained.get((place, kind), {})
                if dataset is not None:
                    options = branch_options(spec.model, dataset, place, kind)
                exits.append(zoo.ExitSpec(f"{place}-{kind}", place, kind, options))
    return cost_of(replace(spec, exits=tuple(exits)), str(model))


def cost_of(spec: zoo.Spec, model: str) -> CostTable:
    """What the early exits of a description cost, in their order there.

    Args:
        model: what to call it.

    Raises:
        CrowdExitError: if the description fits no network.
    """
    network, features = for_one_image(spec)
    width, height = network.config.size
    stages, at_exit = measure(network, features)
    backbone = sum(stages) + at_exit[FINAL]
    costs = []
    for e in spec.exits:
        total = sum(stages[: network.stage_of(e.name) + 1]) + at_exit[e.name]
        params = sum(p.numel() for p in network.exit_module(e.name).parameters())
        costs.append(ExitCost(e.place, e.kind, params, total, total // 2, backbone / total))
    return CostTable(model, f"{width}x{height}", backbone, tuple(costs))


def for_one_image(spec: zoo.Spec) -> tuple[MultiExitNetwork, Features]:
    """The network without numbers, and one view with one second of audio for it."""
    with torch.device("meta"):
        network = zoo.build(spec).eval().requires_grad_(False)
        width, height = network.config.size
        return network, inputs(torch.empty(1, 3, height, width), torch.empty(1, 1, 96, 64))


def measure(network: MultiExitNetwork, features: Features) -> tuple[list[int], dict[str, int]]:
    """FLOPS of each stage alone, and of each exit alone by name (``final`` included)."""
    stages: list[int] = []
    exits: dict[str, int] = {}
    for index, stage in enumerate(network.stages):
        flops, features = _counted(stage, features)
        stages.append(flops)
        for name in network.exit_names:
            if network.stage_of(name) == index:
                exits[name], _ = _counted(network.exit_module(name), features)
    return stages, exits


def _spec(model: str | Path) -> zoo.Spec:
    """The model's description: of the weights, where there are any, for they may differ from the zoo's."""
    name = str(model)
    if name in zoo.names() and name not in zoo.shipped():
        return zoo.Spec(name)
    return zoo.read_spec(zoo.checkpoint_path(model))


def _chosen(name_given: str | None, there: tuple[str, ...], otherwise: str) -> tuple[str, ...]:
    if name_given is None:
        return there
    found = tuple(name for name in there if name.lower() == name_given.lower())
    if not found:
        raise CostError(f"{otherwise} (there are {', '.join(there)})")
    return found


def _counted(module: nn.Module, features: Features) -> tuple[int, Any]:
    """FLOPS of a module, and what it gives."""
    # Only the math backend shows attention's two products as what they are, on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = module(features)
    return counter.get_total_flops(), result
