"""Depthwise convolutions whose kernels are not trained, with a quick backward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


def is_depthwise(module: nn.Module) -> bool:
    """Whether it is a convolution with a kernel of its own for each channel."""
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    rows, columns = (value, value) if isinstance(value, int) else value
    return rows, columns


class _FrozenDepthwise(torch.autograd.Function):
    """A depthwise convolution without a gradient of its kernel.

    That of its input is a convolution with the kernel flipped, of the output's gradient with zeros between its values
    where there is a stride. PyTorch's own is many times slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(kernel)
        ctx.stride, ctx.padding, ctx.size = stride, padding, x.shape[2:]
        return F.conv2d(x, kernel, None, stride, padding, 1, x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (kernel,) = grads, ctx.saved_tensors
        (rows, columns), (sides, stride) = kernel.shape[2:], (grad.shape[2:], ctx.stride)
        if stride != (1, 1):
            apart = [(side - 1) * step + 1 for side, step in zip(sides, stride, strict=True)]
            spread = grad.new_zeros(*grad.shape[:2], *apart).contiguous(memory_format=torch.channels_last)
            spread[:, :, :: stride[0], :: stride[1]] = grad
            grad = spread
        # What the stride left over of the input at its end was never seen, and has no gradient.
        around = (rows - 1, columns - 1)
        grad = F.conv2d(grad, kernel.flip(2, 3), None, 1, around, 1, grad.shape[1])
        (top, left), (height, width) = ctx.padding, ctx.size
        grad = F.pad(grad, (0, max(0, left + width - grad.shape[3]), 0, max(0, top + height - grad.shape[2])))
        return grad[:, :, top : top + height, left : left + width], None, None, None


class QuickFrozenDepthwise(TorchFunctionMode):
    """While it is entered, depthwise convolutions with frozen kernels go backward quickly, to the same gradient.

    Modules stay as they are, and so do the names of their weights.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d:
            quick = self._quick(*args, **(kwargs or {}))
            if quick is not None:
                return quick
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _quick(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: str | int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Tensor | None:
        """The convolution, or None where it is not one of these or nobody asks for its gradient."""
        depthwise = groups == input.shape[1] == weight.shape[0] > 1
        wanted = torch.is_grad_enabled() and input.requires_grad and not weight.requires_grad
        if not depthwise or not wanted or isinstance(padding, str) or _pair(dilation) != (1, 1):
            return None
        if bias is not None:
            return None
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            input, weight = input.to(dtype), weight.to(dtype)
        out: Tensor = _FrozenDepthwise.apply(input, weight, _pair(stride), _pair(padding))  # type: ignore[no-untyped-call]
        return out
