"""Minimal filtering gives what the plain convolution gives, where it is used, and it is used."""

from __future__ import annotations

import pytest
import torch

from crowdexit.models import zoo
from crowdexit.models.stages import inputs
from crowdexit.runtimes import winograd as module
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.selection import select_runtime
from crowdexit.runtimes.winograd import Winograd, convolved, is_filtered

pytestmark = pytest.mark.skipif(not torch.backends.nnpack.is_available(), reason="NNPACK does not know this processor")


@pytest.mark.parametrize("dilation", [1, 2, 3])
@pytest.mark.parametrize(("samples", "channels", "kernels", "height", "width"), [(1, 8, 16, 24, 32), (3, 5, 7, 17, 22)])
def test_the_same_as_plain(dilation, samples, channels, kernels, height, width):
    """Also where the sides are no multiples of the dilation, and at the borders."""
    torch.manual_seed(0)
    x = torch.randn(samples, channels, height, width)
    kernel, bias = torch.randn(kernels, channels, 3, 3), torch.randn(kernels)
    doubled = (t.double() for t in (x, kernel, bias))
    expected = torch.conv2d(*doubled, stride=1, padding=dilation, dilation=dilation)
    given = convolved(x.contiguous(memory_format=torch.channels_last), kernel, bias, dilation)
    assert given.shape == expected.shape
    torch.testing.assert_close(given.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    without = convolved(x, kernel, None, dilation)
    torch.testing.assert_close(without + bias[:, None, None], given, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_what_is_filtered():
    conv = torch.nn.Conv2d
    assert is_filtered(conv(64, 128, 3, padding=1))
    assert is_filtered(conv(256, 256, 3, padding=2, dilation=2))
    for layer in (
        conv(64, 64, 3, padding=1),
        conv(128, 256, 3, padding=2, dilation=2),
        conv(256, 256, 3),
        conv(256, 256, 1),
        conv(256, 256, 3, stride=2, padding=1),
        conv(256, 256, 3, padding=1, groups=2),
        conv(256, 256, 3, padding=1, padding_mode="reflect"),
        conv(256, 256, 3, padding=(1, 2), dilation=(1, 2)),
    ):
        assert not is_filtered(layer)


def test_the_network_answers_alike_and_is_filtered(monkeypatch):
    """Large maps are; those of the ear, and of small images, are not."""
    torch.manual_seed(0)
    spec = zoo.Spec("audiocsrnet-s", changes={"size": (512, 384)})
    network = zoo.build(spec).eval()
    features = inputs(torch.randn(2, 3, 384, 512), torch.randn(2, 1, 96, 64))
    expected = dict(Eager().ready(network).stream(features))["final"]
    filtered = []

    def spy(x, kernel, bias, dilation):
        filtered.append((tuple(x.shape), tuple(kernel.shape), dilation))
        return convolved(x, kernel, bias, dilation)

    monkeypatch.setattr(module, "convolved", spy)
    monkeypatch.setattr(module, "_DILATED_AREA", 48 * 64)
    given = dict(select_runtime("winograd").ready(network).stream(features))["final"]
    torch.testing.assert_close(given.density, expected.density, rtol=1e-3, atol=1e-4 * float(expected.density.max()))
    torch.testing.assert_close(given.value, expected.value, rtol=1e-4, atol=1e-2)
    assert {dilation for *_, dilation in filtered} == {1, 2}
    assert all(shape[2] * shape[3] >= 48 * 64 for shape, *_ in filtered)
    assert len(filtered) == 9


def test_a_processor_without_it(monkeypatch):
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailable, match="needs NNPACK, which is not for this processor"):
        Winograd()
