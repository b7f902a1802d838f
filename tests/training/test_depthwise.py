"""Frozen depthwise convolutions go backward quickly, to the gradient that PyTorch finds."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from crowdexit.models.backbones.efficientnet import LiteStem
from crowdexit.models.backbones.same_padding import SameConv2d
from crowdexit.training.depthwise import QuickFrozenDepthwise, _FrozenDepthwise, is_depthwise


def gradients(module: nn.Module, x: torch.Tensor, quick: bool) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    module = copy.deepcopy(module)
    for part in module.modules():
        if is_depthwise(part):
            part.weight.requires_grad_(False)
    if quick:
        with QuickFrozenDepthwise():
            out = module(x)
    else:
        out = module(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


@pytest.mark.parametrize("size", [(9, 12), (16, 7), (8, 8)])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2, (1, 3)])
@pytest.mark.parametrize("padding", [0, 1, 2])
def test_equal_to_pytorchs(size, kernel, stride, padding):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, kernel, stride, padding, groups=6, bias=False)
    x = torch.randn(2, 6, *size)
    for own, wanted in zip(gradients(conv, x, True), gradients(conv, x, False), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-5)


def test_efficientnet_lite0_up_to_stride_8():
    torch.manual_seed(0)
    stem = LiteStem().eval()
    network = nn.Sequential(stem.conv_stem, stem.bn1, stem.blocks)
    x = torch.randn(1, 3, 64, 64)
    for own, wanted in zip(gradients(network, x, True), gradients(network, x, False), strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


def test_what_it_leaves_alone(monkeypatch):
    used = []
    monkeypatch.setattr(_FrozenDepthwise, "apply", lambda x, *_: used.append(x) or x)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    frozen = SameConv2d(4, 4, 3, groups=4).requires_grad_(False)
    others = [
        SameConv2d(4, 4, 3, groups=4),  # its kernel is trained
        nn.Conv2d(4, 4, 3).requires_grad_(False),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2).requires_grad_(False),
        nn.Conv2d(4, 4, 3, groups=4, padding="same").requires_grad_(False),
        nn.Conv2d(4, 4, 3, groups=4).requires_grad_(False),  # with a bias
    ]
    with QuickFrozenDepthwise():
        for conv in others:
            conv(x)
        frozen(x.detach())
        with torch.no_grad():
            frozen(x)
        assert not used
        frozen(x)
    assert len(used) == 1
    frozen(x)
    assert len(used) == 1


def test_in_bfloat16():
    torch.manual_seed(0)
    conv = SameConv2d(8, 8, 5, stride=2, groups=8).requires_grad_(False)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    found = []
    for quick in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            if quick:
                with QuickFrozenDepthwise():
                    out = conv(x)
            else:
                out = conv(x)
        assert out.dtype == torch.bfloat16
        found.append(torch.autograd.grad(out.float().square().sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)
