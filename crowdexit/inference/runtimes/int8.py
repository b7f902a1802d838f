"""int8 by what was measured once on training images and is kept with the weights: ranges and shifts, no images.

A quantised layer takes its input rounded to 256 levels of its range, and its weights rounded to 127 levels of each
output channel's own largest (255 of a depthwise kernel). Where a processor has no VNNI, two products of 8-bit numbers
are added in 16 bits, which overflow with weights of more levels. Rounded weights move what a layer gives on average;
a shift for each output channel takes that back.

What is written here rounds in float32 ("fake quantisation"); OpenVINO makes products of integers of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from crowdexit.backbones.fronts import AudioEncoder
from crowdexit.network import ActivationRange, MultiExitNetwork
from crowdexit.stages import Features

LEVELS, DEPTHWISE_LEVELS = 63, 127  # of weights, on each side of zero
_Hook = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]


@torch.no_grad()
def measure_ranges(
    network: MultiExitNetwork, batches: Sequence[Features], progress: Callable[[], None] = lambda: None
) -> dict[str, ActivationRange]:
    """What quantising needs of each layer that can be quantised: convolutions of maps, linear layers of tokens.

    Layers of audio encoders and of exits are not among them: they are small, and an exit's layers decide its count.

    Args:
        network: its batch normalisations folded, as it will be quantised.
        batches: of training images; a range covers all of them, and zero.
        progress: called after each batch.

    Returns:
        By the layer's name in the network.
    """
    names = _layers(network)
    lows: dict[str, float] = {}
    highs: dict[str, float] = {}
    means: list[dict[str, Tensor]] = []
    shifts: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if x.dim() == _dimensions(layer):
            lows[name] = min(lows.get(name, 0.0), float(x.min()))
            highs[name] = max(highs.get(name, 0.0), float(x.max()))
            means[-1][name] = _mean(layer, y)

    def correct(of_batch: Mapping[str, Tensor], name: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        shift = of_batch[name] - _mean(layer, y)
        shifts[name] = shifts.get(name, torch.zeros_like(shift)) + shift / len(batches)
        return y + (shift[:, None, None] if isinstance(layer, nn.Conv2d) else shift)

    with _hooked(network, names, note):
        for batch in batches:
            means.append({})
            _see(network, batch)
    ranges = {name: ActivationRange(low, highs[name]) for name, low in lows.items() if highs[name] > 0}
    rounded = quantised(network, ranges)
    for batch, of_batch in zip(batches, means, strict=True):
        # Each layer is corrected before the next sees what it gives.
        with _hooked(rounded, list(ranges), partial(correct, of_batch)):
            _see(rounded, batch)
        progress()
    return {
        name: ActivationRange(found.low, found.high, tuple(float(f"{value:.5g}") for value in shifts[name].tolist()))
        for name, found in ranges.items()
    }


def _layers(network: MultiExitNetwork) -> list[str]:
    """The names of the layers of the stages that see."""
    return [
        f"stages.{index}.{name}"
        for index, stage in enumerate(network.stages)
        if not isinstance(stage, AudioEncoder)
        for name, layer in stage.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]


def _dimensions(layer: nn.Module) -> int:
    """Of what a layer takes of images; a linear layer that takes fewer has the audio's vector."""
    return 4 if isinstance(layer, nn.Conv2d) else 3


def _mean(layer: nn.Module, y: Tensor) -> Tensor:
    return y.mean((0, 2, 3) if isinstance(layer, nn.Conv2d) else (0, 1))


def _see(network: MultiExitNetwork, batch: Features) -> None:
    state = batch
    for stage in network.stages:
        state = stage(state)


@contextmanager
def _hooked(network: nn.Module, names: Sequence[str], hook: _Hook) -> Iterator[None]:
    """While it is entered, ``hook`` is called with a layer's name, the layer, what it took and what it gives."""

    def make(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor | None]:
        return lambda layer, args, y: hook(name, layer, args[0], y)

    handles = [network.get_submodule(name).register_forward_hook(make(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def quantised(network: MultiExitNetwork, ranges: Mapping[str, ActivationRange]) -> MultiExitNetwork:
    """A copy of a network in which the layers that have a range are quantised; it is for inference alone."""
    copied = deepcopy(network)
    for name, found in ranges.items():
        layer: Any = copied.get_submodule(name)
        depthwise = isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1
        levels = DEPTHWISE_LEVELS if depthwise else LEVELS
        parametrize.register_parametrization(layer, "weight", _RoundedWeights(layer.weight, levels))
        layer.register_forward_pre_hook(_RoundedInput(found))
        if found.shifts:
            shift = torch.tensor(found.shifts)
            layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift, requires_grad=False)
    return copied


class _RoundedWeights(nn.Module):
    """Weights, output channels first, on levels symmetric about zero.

    Args:
        weight: for whose largest, by output channel, the levels are made. levels: on each side of zero.
    """

    scale: Tensor
    zero: Tensor

    def __init__(self, weight: Tensor, levels: int) -> None:
        super().__init__()
        self.levels = levels
        self.register_buffer("scale", weight.detach().flatten(1).abs().amax(1).clamp(min=1e-12) / levels)
        self.register_buffer("zero", torch.zeros(len(weight), dtype=torch.int32))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.fake_quantize_per_channel_affine(weight, self.scale, self.zero, 0, -self.levels, self.levels)


class _RoundedInput:
    """What a layer takes, on 256 levels: from zero up where nothing is below it, else symmetric about zero."""

    def __init__(self, found: ActivationRange) -> None:
        if found.low >= 0:
            self.scale, self.levels = found.high / 255, (0, 255)
        else:
            self.scale, self.levels = max(-found.low / 128, found.high / 127), (-128, 127)

    def __call__(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.fake_quantize_per_tensor_affine(args[0], self.scale, 0, *self.levels),)
