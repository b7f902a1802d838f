"""Telling classes apart: every exit's accuracy and latency on a prepared classification set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from crowdexit.data.classes import ClassDataset, ClassStore
from crowdexit.errors import CrowdExitError
from crowdexit.inference.runtime import pick
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import inputs

BATCH = 64
TIMED = 20


class ClassError(CrowdExitError):
    """A classifier that was made for other classes."""


def evaluate(
    network: MultiExitNetwork,
    runtime: str,
    store: ClassStore,
    split: str,
    wanted: Sequence[int],
    *,
    progress: Any = None,
) -> dict[str, Any]:
    """Accuracy and latency of each exit.

    Args:
        runtime: ``auto``, or a name of :func:`crowdexit.inference.runtime.names`.
        wanted: which pictures of the split.
        progress: called after each picture.

    Returns:
        ``{"split", "samples", "exits": [{"exit", "accuracy", "latency_ms"}]}``; accuracy in percent, latency the
        mean over the first pictures, one at a time.

    Raises:
        CrowdExitError: if the network was made for another number of classes, or the set is damaged.
    """
    outputs = getattr(network.config, "outputs", 0)
    if outputs != len(store.classes):
        raise ClassError(f"{store.path}: {len(store.classes)} classes, and the network knows {outputs}")
    chain = pick(runtime).ready(network)
    pictures = ClassDataset(store, split, size=network.config.size)
    names = network.exit_names
    right = dict.fromkeys(names, 0)
    for start in range(0, len(wanted), BATCH):
        items = [pictures[index] for index in wanted[start : start + BATCH]]
        labels = torch.stack([item["label"] for item in items])
        batch = inputs(torch.stack([item["image"] for item in items]))
        for name, answer in chain.stream(batch, names):
            right[name] += int((answer.value.argmax(1) == labels).sum())
        for _ in items if progress else ():
            progress()
    times: dict[str, list[float]] = {name: [] for name in names}
    for index in [wanted[0], *wanted[:TIMED]]:  # the first once more, for the warm-up
        one = inputs(pictures[index]["image"][None])
        begun = time.perf_counter()
        for name, _ in chain.stream(one, names):
            times[name].append(1e3 * (time.perf_counter() - begun))
    return {
        "split": split,
        "samples": len(wanted),
        "exits": [
            {
                "exit": name,
                "accuracy": 100 * right[name] / len(wanted),
                "latency_ms": float(np.mean(times[name][1:])),
            }
            for name in names
        ],
    }
