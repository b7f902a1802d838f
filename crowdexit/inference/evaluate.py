"""Every exit's error on a prepared set, with or without sound, under chosen conditions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.data.augment import Conditions
from crowdexit.data.picture import decode_picture
from crowdexit.data.store import Store
from crowdexit.inference.counter import CrowdCounter


def read_for_counting(
    store: Store, split: str, id: str, *, audio: bool = True, conditions: Conditions = Conditions()
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None, float, str]:
    """(picture, log-mel or None, count, audio source) of a stored sample under conditions fixed by its id."""
    sample = store.read(split, id)
    picture = decode_picture(sample.image.tobytes(), f"{split}/{id}")
    seed = np.frombuffer(id.encode(), np.uint8)
    picture = conditions.apply(picture, np.random.default_rng(seed))
    return picture, sample.log_mel if audio else None, sample.count, sample.audio_source


def evaluate(
    counter: CrowdCounter,
    store: Store,
    split: str,
    ids: Sequence[str],
    *,
    audio: bool = True,
    conditions: Conditions = Conditions(),
    progress: Any = None,
) -> dict[str, Any]:
    """MAE, RMSE and mean latency of each exit.

    Args:
        ids: of the samples of ``split``.
        audio: False counts without sound even where there is some.
        progress: called after each sample.

    Returns:
        ``{"split", "audio", "samples", "exits": [{"exit", "mae", "rmse", "latency_ms"}]}``; ``audio`` is where
        the sound came from (``recorded``, ``simulated``, ``none``, or ``mixed``). The first sample is run once
        beforehand, so that no latency counts the warm-up.
    """
    errors: dict[str, list[float]] = {name: [] for name in counter.exits}
    latencies: dict[str, list[float]] = {name: [] for name in counter.exits}
    sources = set()
    for number, id in enumerate(ids):
        picture, mel, count, source = read_for_counting(store, split, id, audio=audio, conditions=conditions)
        sources.add(source if mel is not None else "none")
        if number == 0:
            for _ in counter.stream(picture, mel):
                pass
        for result in counter.stream(picture, mel):
            errors[result.exit].append(result.count - count)
            latencies[result.exit].append(result.latency_ms)
        if progress is not None:
            progress()
    return {
        "split": split,
        "audio": sources.pop() if len(sources) == 1 else "mixed",
        "samples": len(ids),
        "exits": [
            {
                "exit": name,
                "mae": float(np.mean(np.abs(errors[name]))),
                "rmse": float(np.sqrt(np.mean(np.square(errors[name])))),
                "latency_ms": float(np.mean(latencies[name])),
            }
            for name in counter.exits
        ],
    }
