"""Networks of every kind, small enough to be compiled in a test."""

from __future__ import annotations

import torch
from branches import both_kinds
from tiny import TINY
from torch import nn

from crowdexit.models import zoo
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import Features, inputs

VIT = {
    "size": [64, 64],
    "dim": 12,
    "depth": 3,
    "heads": 2,
    "hidden": 8,
    "slvit_dim": 4,
    "slvit_heads": 2,
    "filters": 2,
    "latents": 4,
    "audio_width": 0.0625,
}
SPECS = {
    "audiocsrnet": zoo.Spec("audiocsrnet-s", both_kinds(), TINY),
    "transcrowd-tiles": zoo.Spec(
        "transcrowd-token-s", tuple(zoo.ExitSpec(kind, "1", kind) for kind in ("mlp", "slvit-audio")), VIT
    ),
    "transcrowd-fit": zoo.Spec("transcrowd-gap-s", (zoo.ExitSpec("2", "2", "vit"),), {**VIT, "view": "fit"}),
    "classifier": zoo.Spec(
        "resnet18",
        (zoo.ExitSpec("1", "1", "cnn"), zoo.ExitSpec("2", "2", "slvit")),
        {"size": [32, 32], "outputs": 3, "top": 0},
    ),
}


def made(name: str) -> MultiExitNetwork:
    """A network by its name in ``SPECS``, with random weights and answers of some size."""
    torch.manual_seed(4)
    return settled(zoo.build(SPECS[name]))


def every_branch() -> MultiExitNetwork:
    """A transformer with all kinds of branches at one place."""
    torch.manual_seed(4)
    kinds = zoo.build(zoo.Spec("transcrowd-token-s", (), VIT)).branch_kinds("1")
    exits = tuple(zoo.ExitSpec(kind, "1", kind) for kind in kinds)
    return settled(zoo.build(zoo.Spec("transcrowd-token-s", exits, VIT)))


def settled(network: MultiExitNetwork) -> MultiExitNetwork:
    """Batch normalisations that have seen something, and last layers with a bias: no answer is lost in rounding."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name in network.exit_names:
        last = [module for module in network.exit_module(name).modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        nn.init.constant_(last[-1].bias, 0.5)
    return network.eval()


def batch(network: MultiExitNetwork, length: int, seed: int = 0) -> Features:
    """Random images; every other one is heard, and what stands in the rows of the rest is not a number."""
    random = torch.Generator().manual_seed(seed)
    width, height = network.config.size
    has_audio = torch.arange(length) % 2 == 0
    log_mel = torch.randn(length, 1, 96, 64, generator=random)
    log_mel[~has_audio] = float("nan")
    inside = torch.rand(length, 1, height // 8, width // 8, generator=random)
    return inputs(torch.randn(length, 3, height, width, generator=random), log_mel, has_audio, inside)
