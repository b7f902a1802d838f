"""int8 from the ranges of a network's activations: measured once on training images, kept with the weights.

A quantised layer takes its input rounded to 256 levels of its range, and weights rounded to 255 levels of each output
channel's own largest; everything else computes as before. What is written here rounds in float32 ("fake
quantisation"); OpenVINO makes products of integers of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from crowdexit.backbones.fronts import AudioEncoder
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import Features

WEIGHT_LEVELS = 127  # on each side of zero
Ranges = Mapping[str, tuple[float, float]]


@torch.inference_mode()
def measure_ranges(
    network: MultiExitNetwork, batches: Iterable[Features], progress: Callable[[], None] = lambda: None
) -> dict[str, tuple[float, float]]:
    """The ranges of what the layers that can be quantised take: convolutions of maps, linear layers of tokens.

    Layers of audio encoders and of exits are not among them: they are small, and an exit's layers decide its count.

    Args:
        network: its batch normalisations folded, as it will be quantised.
        batches: of training images; the range covers all of them, and zero.
        progress: called after each batch.

    Returns:
        (lowest, highest) by the layer's name in the network.
    """
    ranges: dict[str, tuple[float, float]] = {}

    def note(name: str, x: Tensor) -> None:
        low, high = ranges.get(name, (0.0, 0.0))
        ranges[name] = min(low, float(x.min())), max(high, float(x.max()))

    hooks = []
    for name, layer, dimensions in _layers(network):

        def hook(_: nn.Module, args: tuple[Tensor], name: str = name, dimensions: int = dimensions) -> None:
            if args[0].dim() == dimensions:
                note(name, args[0])

        hooks.append(layer.register_forward_pre_hook(hook))
    try:
        for batch in batches:
            state = batch
            for stage in network.stages:
                state = stage(state)
            progress()
    finally:
        for one in hooks:
            one.remove()
    return {name: (low, high) for name, (low, high) in ranges.items() if high > low}


def _layers(network: MultiExitNetwork) -> list[tuple[str, nn.Module, int]]:
    """The layers of the stages that see, by name, each with the number of dimensions that it takes of images."""
    sees = [index for index, stage in enumerate(network.stages) if not isinstance(stage, AudioEncoder)]
    return [
        (f"stages.{index}.{name}", layer, 4 if isinstance(layer, nn.Conv2d) else 3)
        for index in sees
        for name, layer in network.stages[index].named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]


def quantised(network: MultiExitNetwork, ranges: Ranges) -> MultiExitNetwork:
    """A copy of a network in which the layers that have a range are quantised; it is for inference alone.

    Raises:
        KeyError: for a range of a layer that the network does not have.
    """
    copied = deepcopy(network)
    layers = dict(copied.named_modules())
    for name, (low, high) in ranges.items():
        layer: Any = layers[name]
        scale = layer.weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / WEIGHT_LEVELS
        parametrize.register_parametrization(layer, "weight", _RoundedWeights(scale))
        layer.register_forward_pre_hook(_RoundedInput(low, high))
    return copied


class _RoundedWeights(nn.Module):
    """Weights (output channels first) on 255 levels, symmetric about zero."""

    scale: Tensor
    zero: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero", torch.zeros(len(scale), dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        levels = -WEIGHT_LEVELS, WEIGHT_LEVELS
        return torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero, 0, *levels)


class _RoundedInput:
    """What a layer takes, on 256 levels: from zero up where nothing is below it, else symmetric about zero."""

    def __init__(self, low: float, high: float) -> None:
        if low >= 0:
            self.scale, self.levels = high / 255, (0, 255)
        else:
            self.scale, self.levels = max(-low / 128, high / 127), (-128, 127)

    def __call__(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.fake_quantize_per_tensor_affine(args[0], self.scale, 0, *self.levels),)
