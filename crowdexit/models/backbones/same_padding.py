"""TensorFlow's SAME padding where the stride divides the sides: fixed numbers, whatever the size of the input."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SameConv2d(nn.Conv2d):
    """A square convolution with TensorFlow's SAME padding, without bias, for sides that the stride divides.

    The padding of both sides adds up to kernel − stride; an odd pixel of it comes last. A graph that is made of it at
    one size holds for all of them, which timm's ``Conv2dSame`` does not give: it works the padding out anew.
    """

    def __init__(self, channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride=stride, groups=groups, bias=False)
        around = kernel - stride
        self.around = (around // 2, around - around // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.around))
