"""int8 quantisation by ranges and shifts that were measured once on training images and are stored with the weights.

A quantised layer rounds its input to levels of its range, and its weights to levels of each output channel's largest
weight. Without VNNI, products of 8-bit numbers are added in pairs in 16 bits, which may overflow, so one operand uses
only half of the levels: the input if every image fills its range (after a ReLU6), else the weights; neither in
depthwise convolutions, which add no pairs. Rounded weights change the mean output of a layer; a shift for each output
channel corrects it (except where audio is fused: there the mean is that of a few cells, and the shift would be added
to all empty ones).

This module rounds in float32 ("fake quantisation"); OpenVINO converts that to integer products.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from crowdexit.models.network import ActivationRange, MultiExitNetwork
from crowdexit.models.stages import Features

HALF, FULL = 63, 127  # levels of weights, on each side of zero
# Highest over median maximum of the images: up to the first the range is filled; beyond the second nearly all values
# lie on few levels, and the layer is not quantised.
FILLED, SPREAD = 1.1, 2.5
_Hook = Callable[[str, nn.Module, Tensor, Tensor], Tensor | None]


@torch.no_grad()
def measure_ranges(
    network: MultiExitNetwork, batches: Sequence[Features], progress: Callable[[], None] = lambda: None
) -> dict[str, ActivationRange]:
    """Measure the ranges of each layer that can be quantised: convolutions of maps, linear layers of tokens.

    Layers of audio encoders and of exits are excluded: they are small, and an exit's layers determine its count. So are
    those that take the image itself, or whose largest values are rare.

    Args:
        network: its batch normalisations folded, as it will be quantised.
        batches: of training images; a range covers all of them, and zero.
        progress: called after each batch.

    Returns:
        By the layer's name in the network.
    """
    names = _layers(network)
    lows: dict[str, float] = {}
    highs: dict[str, list[float]] = defaultdict(list)
    means: list[dict[str, Tensor]] = []
    shifts: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        if x.dim() == _dimensions(layer):
            lows[name] = min(lows.get(name, 0.0), float(x.min()))
            highs[name].append(max(0.0, float(x.max())))
            means[-1][name] = _mean(layer, y)

    def correct(of_batch: Mapping[str, Tensor], name: str, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        shift = of_batch[name] - _mean(layer, y)
        shifts[name].append(shift)
        return y + (shift[:, None, None] if isinstance(layer, nn.Conv2d) else shift)

    with _hooked(network, names, note):
        for batch in batches:
            means.append({})
            _see(network, batch)
    ranges: dict[str, ActivationRange] = {}
    for name, low in lows.items():
        high, nominal = max(highs[name]), median(highs[name])
        if 0 < high <= SPREAD * nominal:
            ranges[name] = ActivationRange(low, high, 127 if low >= 0 and high <= FILLED * nominal else 255)
    rounded = quantised(network, ranges)
    fusing = tuple(f"stages.{index}." for index, stage in enumerate(network.stages) if stage.fuses_audio)
    shifted = [name for name in ranges if not name.startswith(fusing)]
    for batch, of_batch in zip(batches, means, strict=True):
        # Each layer is corrected before the next is measured.
        with _hooked(rounded, shifted, partial(correct, of_batch)), parametrize.cached():
            _see(rounded, batch)
        progress()
    return {name: replace(found, shifts=_medians(shifts[name])) for name, found in ranges.items()}


def _medians(shifts: Sequence[Tensor]) -> tuple[float, ...]:
    if not shifts:
        return ()
    return tuple(float(f"{value:.5g}") for value in torch.stack(list(shifts)).quantile(0.5, dim=0).tolist())


def _layers(network: MultiExitNetwork) -> list[str]:
    """The names of the layers of the visual stages."""
    return [
        f"stages.{index}.{name}"
        for index, stage in enumerate(network.stages)
        if stage is not network.audio_encoder
        for name, layer in stage.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not _takes_image(layer)
    ]


def _takes_image(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.in_channels == 3


def _dimensions(layer: nn.Module) -> int:
    """The inputs of a layer from images; a linear layer with fewer dimensions takes the audio vector."""
    return 4 if isinstance(layer, nn.Conv2d) else 3


def _mean(layer: nn.Module, y: Tensor) -> Tensor:
    return y.mean((0, 2, 3) if isinstance(layer, nn.Conv2d) else (0, 1))


def _see(network: MultiExitNetwork, batch: Features) -> None:
    state = batch
    for stage in network.stages:
        state = stage(state)


@contextmanager
def _hooked(network: nn.Module, names: Sequence[str], hook: _Hook) -> Iterator[None]:
    """Call ``hook`` with each layer's name, the layer, its input and its output."""

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
    """A copy of a network with quantised layers where ranges exist; for inference only."""
    copied = deepcopy(network)
    for name, found in ranges.items():
        layer: Any = copied.get_submodule(name)
        depthwise = _is_depthwise(layer)
        weights = _RoundedWeights(layer.weight, FULL if depthwise or found.steps == 127 else HALF)
        parametrize.register_parametrization(layer, "weight", weights)
        layer.register_forward_pre_hook(_RoundedInput(replace(found, steps=255) if depthwise else found))
        if found.shifts:
            shift = torch.tensor(found.shifts)
            layer.bias = nn.Parameter(shift if layer.bias is None else layer.bias + shift, requires_grad=False)
    return copied


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == layer.in_channels > 1


class _RoundedWeights(nn.Module):
    """Weights, output channels first, on levels symmetric about zero.

    Args:
        weight: its largest value by output channel sets the levels. levels: on each side of zero.
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
    """Round a layer's input: from zero up if it is not negative, else symmetric about zero.

    OpenVINO supports 256 levels only; with 127 steps the lower half is used.
    """

    def __init__(self, found: ActivationRange) -> None:
        if found.low >= 0:
            self.scale, self.levels = found.high / found.steps, (0, 255)
        else:
            self.scale, self.levels = max(-found.low / 128, found.high / 127), (-128, 127)

    def __call__(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (torch.fake_quantize_per_tensor_affine(args[0], self.scale, 0, *self.levels),)
