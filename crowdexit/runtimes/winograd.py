"""Eager PyTorch in float32 on the CPU, its large 3×3 convolutions by Winograd's minimal filtering.

For 6×6 numbers of a map a 3×3 kernel multiplies 324 times, Winograd's F(6×6, 3×3) 64 times (Lavin and Gray, Fast
algorithms for convolutional neural networks, 2016); numbers on a map differ by about 1e-5 of the largest. It gains
where a processor has no bfloat16 and the network is wide: half-width ones run faster elsewhere. The filtering is
NNPACK's, which comes with PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.base import ReadyChain, register_runtime
from crowdexit.runtimes.eager import Eager, EagerChain

# Where it is worth it, from so many kernels and numbers on a map: with fewer the transforms cost what they save. A
# dilated one is laid out anew before and after, which costs as well.
_KERNELS, _AREA = 64 * 128, 48 * 64
_DILATED_KERNELS, _DILATED_AREA = 256 * 256, 72 * 128


@register_runtime("winograd")
class Winograd(Eager):
    """Eager PyTorch, float32 on the CPU, with minimal filtering where it is worth it.

    Raises:
        RuntimeUnavailable: on a processor that NNPACK does not know.
    """

    def __init__(self, name: str = "winograd") -> None:
        super().__init__(name)
        if not torch.backends.nnpack.is_available():
            raise RuntimeUnavailable(f"the runtime {name!r} needs NNPACK, which is not for this processor")

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        super().ready(network)
        kernels = {id(layer.weight): layer.weight.detach().contiguous() for layer in filtered_layers(network)}
        return _WinogradChain(network, self.name, kernels)


def filtered_layers(network: torch.nn.Module) -> list[torch.nn.Conv2d]:
    """The convolutions that are done by minimal filtering, where their maps are large enough."""
    return [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d) and is_filtered(layer)]


def is_filtered(layer: torch.nn.Conv2d) -> bool:
    """Whether a convolution is done by minimal filtering, where its maps are large enough."""
    least = _KERNELS if layer.dilation == (1, 1) else _DILATED_KERNELS
    return (
        layer.kernel_size == (3, 3)
        and layer.stride == (1, 1)
        and layer.groups == 1
        and layer.dilation[0] == layer.dilation[1]
        and layer.padding == layer.dilation
        and layer.padding_mode == "zeros"
        and layer.in_channels * layer.out_channels >= least
    )


class _WinogradChain(EagerChain):
    """
    Args:
        kernels: of the layers that are filtered, in the usual order in memory, by the identity of their parameters.
    """

    def __init__(self, network: MultiExitNetwork, runtime: str, kernels: Mapping[int, Tensor]) -> None:
        super().__init__(network, runtime, torch.device("cpu"), None)
        self._kernels = kernels

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with super()._mode(), _Filtering(self._kernels):
            yield


class _Filtering(TorchFunctionMode):
    """Does those convolutions in place of PyTorch's own."""

    def __init__(self, kernels: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d and len(args) == 7:  # as layers call it
            x, weight, bias, _, _, dilation, _ = args
            kernel = self._kernels.get(id(weight))
            least = _AREA if dilation[0] == 1 else _DILATED_AREA
            if kernel is not None and x.shape[2] * x.shape[3] >= least:
                return convolved(x, kernel, bias, dilation[0])
        return func(*args, **(kwargs or {}))


def convolved(x: Tensor, kernel: Tensor, bias: Tensor | None, dilation: int) -> Tensor:
    """A map (N, C, H, W) under a 3×3 kernel (D, C, 3, 3) of that dilation, padded with zeros: (N, D, H, W)."""
    laid = x if dilation == 1 else _apart(x, dilation)
    # Several samples at once NNPACK does by another way, which is slower than one after the other.
    out = [torch._nnpack_spatial_convolution(one, kernel, bias, [1, 1], [1, 1]) for one in laid.contiguous().split(1)]
    made = out[0] if len(out) == 1 else torch.cat(out)
    return made if dilation == 1 else _together(made, dilation, x.shape[2], x.shape[3])


def _apart(x: Tensor, step: int) -> Tensor:
    """A map in which every ``step``-th row and column of another stand together, a line of zeros between such pieces.

    What a dilated kernel sees there are neighbours.
    """
    samples, channels, height, width = x.shape
    down, across = _of_a_piece(height, step), _of_a_piece(width, step)
    laid = x.new_zeros(samples, channels, step * down - 1, step * across - 1)
    for row, column in product(range(step), repeat=2):
        piece = x[:, :, row::step, column::step]
        laid[:, :, row * down :, column * across :][:, :, : piece.shape[2], : piece.shape[3]] = piece
    return laid


def _together(laid: Tensor, step: int, height: int, width: int) -> Tensor:
    """Rows and columns where they came from: what :func:`_apart` did, undone."""
    down, across = _of_a_piece(height, step), _of_a_piece(width, step)
    out = laid.new_empty(*laid.shape[:2], height, width)
    for row, column in product(range(step), repeat=2):
        piece = out[:, :, row::step, column::step]
        piece.copy_(laid[:, :, row * down :, column * across :][:, :, : piece.shape[2], : piece.shape[3]])
    return out


def _of_a_piece(side: int, step: int) -> int:
    """Lines from where one piece begins to where the next does."""
    return -(-side // step) + 1
