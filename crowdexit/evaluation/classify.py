"""Classification: accuracy and latency of every exit on a prepared set, and of early exits by confidence."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crowdexit.calibration.temperatures import Measure, Temperatures, temperature
from crowdexit.data.classes import ClassDataset, ClassStore
from crowdexit.data.store import StoreError
from crowdexit.errors import CrowdExitError
from crowdexit.inference.counter import default_exits
from crowdexit.inference.executor import Batch, BatchExitOutput, Part, StageExecutor
from crowdexit.inference.policies import Confident
from crowdexit.models.stages import Features, inputs
from crowdexit.runtimes.base import ReadyChain

BATCH = 64
TIMED = 20


class ClassError(CrowdExitError):
    """A classifier that was made for other classes."""


@dataclass(frozen=True)
class EarlyExitRule:
    """Exit early at the first exit whose uncertainty is at or below a bound.

    Attributes:
        measure: of uncertainty (:mod:`crowdexit.calibration.temperatures`).
        bound: of the uncertainty, above zero.
        temperatures: the checkpoint's calibration.
    """

    measure: Measure
    bound: float
    temperatures: Temperatures

    def run(self, chain: ReadyChain, exits: Sequence[str], features: Features) -> Iterator[BatchExitOutput]:
        """What is reported of a batch, of each sample until it leaves."""
        size = len(features.visual)
        part = Part(np.arange(size), np.ones(size, np.intp), [Batch(lambda: features, size)])

        def uncertainty(output: BatchExitOutput) -> NDArray[np.float64]:
            return self.temperatures.uncertainties(output.exit, output.values, self.measure)

        return filter(
            None, StageExecutor(chain, size, exits, uncertainty=uncertainty).run([part], Confident(self.bound))
        )


def evaluate(
    chain: ReadyChain,
    store: ClassStore,
    split: str,
    wanted: Sequence[int],
    *,
    leaving: EarlyExitRule | None = None,
    progress: Any = None,
) -> dict[str, Any]:
    """Accuracy and latency of each exit.

    Args:
        chain: a classifier, ready to be run.
        wanted: which images of the split.
        leaving: also evaluate this rule at the default exits.
        progress: called after each image.

    Returns:
        ``{"split", "samples", "exits": [{"exit", "accuracy", "latency_ms"}]}``; accuracy in percent, latency the
        mean over the first images, one at a time. With ``leaving`` also ``"leaving"``: ``{"measure", "bound",
        "accuracy", "latency_ms", "left"}``, the last the percentage that leaves at each exit.

    Raises:
        CrowdExitError: if the network was made for another number of classes, or the set is damaged.
    """
    images = _opened(chain, store, split)
    names = chain.exit_names
    right = dict.fromkeys(names, 0)
    served = default_exits(chain.network)
    sure, left = 0, dict.fromkeys(served, 0)
    for batch, labels in _batches(images, wanted):
        for name, answer in chain.stream(batch, names):
            right[name] += int((answer.value.argmax(1).numpy() == labels).sum())
        if leaving is not None:
            chosen, exits = np.empty(len(labels), np.int64), np.empty(len(labels), object)
            for output in leaving.run(chain, served, batch):
                chosen[output.samples], exits[output.samples] = output.values.argmax(1), output.exit
            sure += int((chosen == labels).sum())
            for name in exits:
                left[name] += 1
        for _ in labels if progress else ():
            progress()
    times: dict[str, list[float]] = {name: [] for name in names}
    until_sure: list[float] = []
    for index in [wanted[0], *wanted[:TIMED]]:  # the first once more, for the warm-up
        one = inputs(images[index]["image"][None])
        begun = time.perf_counter()
        for name, _ in chain.stream(one, names):
            times[name].append(1e3 * (time.perf_counter() - begun))
        if leaving is not None:
            begun = time.perf_counter()
            list(leaving.run(chain, served, one))
            until_sure.append(1e3 * (time.perf_counter() - begun))
    result: dict[str, Any] = {
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
    if leaving is not None:
        result["leaving"] = {
            "measure": leaving.measure,
            "bound": leaving.bound,
            "accuracy": 100 * sure / len(wanted),
            "latency_ms": float(np.mean(until_sure[1:])),
            "left": {name: 100 * number / len(wanted) for name, number in left.items()},
        }
    return result


def scores_of(
    chain: ReadyChain,
    store: ClassStore,
    split: str,
    wanted: Sequence[int],
    *,
    exits: Sequence[str] | None = None,
    progress: Any = None,
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]:
    """Scores (n, K) that exits, all by default, give to images of a split, and the images' classes (n,).

    Raises:
        CrowdExitError: as :func:`evaluate`.
    """
    images = _opened(chain, store, split)
    scores: dict[str, list[NDArray[np.float32]]] = {name: [] for name in exits or chain.exit_names}
    truth = []
    for batch, labels in _batches(images, wanted):
        for name, answer in chain.stream(batch, exits):
            scores[name].append(answer.value.numpy())
        truth.append(labels)
        for _ in labels if progress else ():
            progress()
    return {name: np.concatenate(parts) for name, parts in scores.items()}, np.concatenate(truth)


def calibrate(scores: Mapping[str, NDArray[np.float32]], labels: NDArray[np.int64]) -> Temperatures:
    """A temperature for every exit, from its scores (n, K) of held-out images and their classes (n,).

    Raises:
        TemperatureError: as :func:`crowdexit.calibration.temperatures.temperature`.
    """
    return Temperatures({name: temperature(of_exit, labels) for name, of_exit in scores.items()}, len(labels))


def matching(store: ClassStore, split: str, pattern: str) -> list[int]:
    """Which images of a split have an id that matches a shell pattern.

    Raises:
        StoreError: if none has, or the split is not there.
    """
    found = [index for index, id in enumerate(store.ids(split)) if fnmatchcase(id, pattern)]
    if not found:
        raise StoreError(f"{store.path}: no image of {split} matches {pattern!r}")
    return found


def _opened(chain: ReadyChain, store: ClassStore, split: str) -> ClassDataset:
    """Images of the classes that a network tells apart.

    Raises:
        ClassError: if it was made for another number of them.
    """
    config = chain.network.config
    outputs = getattr(config, "outputs", 0)
    if outputs != len(store.classes):
        raise ClassError(f"{store.path}: {len(store.classes)} classes, and the network knows {outputs}")
    return ClassDataset(store, split, size=config.size)


def _batches(images: ClassDataset, wanted: Sequence[int]) -> Iterator[tuple[Features, NDArray[np.int64]]]:
    """Images and their classes (n,), a batch at a time."""
    for start in range(0, len(wanted), BATCH):
        items = [images[index] for index in wanted[start : start + BATCH]]
        labels = torch.stack([item["label"] for item in items])
        yield inputs(torch.stack([item["image"] for item in items])), labels.numpy()
