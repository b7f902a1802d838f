"""Batch normalisations that start from statistics of the data, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from crowdexit.models.network import MultiExitNetwork
from crowdexit.training.losses import Batch
from crowdexit.training.modules import record


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch normalisation with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _is_fresh(norm: _BatchNorm) -> bool:
    """Whether its running statistics are those that it was made with."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return not norm.running_mean.any() and bool((norm.running_var == 1).all())


@torch.no_grad()
def start_norms(network: MultiExitNetwork, batches: Callable[[], Iterable[Batch]]) -> int:
    """Give the backbone's freshly initialised batch normalisations the mean statistics of some batches.

    Those that have statistics, from published weights or a checkpoint, keep them, and are used with them.

    Returns:
        How many there were to start.
    """
    fresh = [m for m in network.stages.modules() if isinstance(m, _BatchNorm) and is_norm(m) and _is_fresh(m)]
    if not fresh:
        return 0
    network.eval()
    momenta = [norm.momentum for norm in fresh]
    for norm in fresh:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
        norm.train()
    for batch in batches():
        features = record(batch)
        for stage in network.stages:
            features = stage(features)
    for norm, momentum in zip(fresh, momenta, strict=True):
        norm.momentum = momentum
    network.eval()
    return len(fresh)
