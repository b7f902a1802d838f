"""Latency of a network's steps: measured on this machine, cached between runs, updated while it runs.

A step is a stage or an exit. Other load slows all steps of a run alike, so only the first stage is stored in
milliseconds; every other step is stored as a multiple of the first stage of the same run. The remaining time of a run
is predicted from its own first stage, so entries of rarely run stages stay valid.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.model_cache import gpu_name, installed_version
from crowdexit.utils.machine import cache_folder, processor

MAX_MEASUREMENTS = 64  # measurements of a step; the oldest is replaced
MOST_PROFILES = 100  # files; the oldest is removed
_FORMAT = 1


def stage_step(index: int) -> str:
    """A stage's name in a profile."""
    return f"stage {index}"


def exit_step(name: str) -> str:
    """An exit's name in a profile."""
    return f"exit {name}"


FIRST = stage_step(0)
PREPARING = "preparing"  # an image: decoded, resized, with its audio
LAYING = "laying out"  # rows: normalised and collated for the first stage
_BY_THEMSELVES = (FIRST, PREPARING, LAYING)  # stored in milliseconds


class Profile:
    """The last measurements of every step, by how many rows were in the batch.

    Args:
        path: of its file; None: in memory only.
        key: identifies what was measured; a file with another key is not read.
    """

    def __init__(self, path: Path | None = None, key: Mapping[str, Any] | None = None) -> None:
        self._path, self._key = path, dict(key or {})
        self._lock = threading.Lock()
        self._times: dict[str, dict[int, deque[float]]] = defaultdict(dict)

    def note(self, step: str, rows: int, ms: float, first_ms: float | None = None) -> None:
        """Add a measurement of a step with that many rows.

        Args:
            first_ms: time of the first stage of the same run with as many rows; None: store ``ms`` itself (for the
                first stage and the steps before it).
        """
        value = ms if first_ms is None else ms / first_ms if first_ms > 0 else 0.0
        with self._lock:
            self._times[step].setdefault(rows, deque(maxlen=MAX_MEASUREMENTS)).append(value)

    def ms(
        self, step: str, rows: int = 1, *, quantile: float = 0.5, first_ms: float | None = None, min_samples: int = 1
    ) -> float | None:
        """Expected time of a step with that many rows, in milliseconds; None if unknown.

        Interpolated between measured numbers of rows, and proportional to the rows beyond them.

        Args:
            quantile: of the stored measurements.
            first_ms: time of the first stage of this run; default: its median.
            min_samples: number of measurements required.
        """
        with self._lock:
            known = sorted(
                (n, sorted(kept)) for n, kept in self._times.get(step, {}).items() if len(kept) >= min_samples
            )
        if not known:
            return None
        values = [(n, kept[math.ceil(quantile * len(kept)) - 1 if quantile > 0 else 0]) for n, kept in known]
        if step in _BY_THEMSELVES:
            return _between(values, rows, beyond=True)
        first_ms = self.ms(FIRST, rows) if first_ms is None else first_ms
        return None if first_ms is None else _between(values, rows, beyond=False) * first_ms

    def total_ms(self, steps: Sequence[str], rows: int = 1, **how: Any) -> float | None:
        """Expected total time of several steps; None if one is unknown. Arguments as of :meth:`ms`."""
        times = [self.ms(step, rows, **how) for step in steps]
        known = [ms for ms in times if ms is not None]
        return sum(known) if len(known) == len(times) else None

    def knows(self, steps: list[str]) -> bool:
        """Whether each of these steps was measured."""
        with self._lock:
            return all(self._times.get(step) for step in steps)

    def forget(self) -> None:
        """Clear all measurements; the file stays until the next write."""
        with self._lock:
            self._times = defaultdict(dict)

    def read(self) -> bool:
        """Load its file; False, without changes, if that is missing, damaged or has another key."""
        if self._path is None:
            return False
        try:
            data = json.loads(self._path.read_text("utf-8"))
            if data["format"] != _FORMAT or data["key"] != self._key:
                return False
            times: dict[str, dict[int, deque[float]]] = defaultdict(dict)
            for step, of_step in data["times"].items():
                for rows, kept in of_step.items():
                    known = 1 <= int(rows) <= sys.maxsize
                    if not known or not kept or not all(0 <= value < math.inf for value in kept):
                        return False
                    times[step][int(rows)] = deque(map(float, kept), MAX_MEASUREMENTS)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return False
        with self._lock:
            self._times = times
        return True

    def write(self) -> None:
        """Save it atomically; a cache that cannot be written is skipped."""
        if self._path is None:
            return
        with self._lock:
            times = {
                step: {str(rows): [float(f"{value:.5g}") for value in kept] for rows, kept in of_step.items()}
                for step, of_step in self._times.items()
            }
        part = self._path.with_name(f"{self._path.name}.{uuid4().hex}.part")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps({"format": _FORMAT, "key": self._key, "times": times}), "utf-8")
                part.replace(self._path)
            finally:
                part.unlink(missing_ok=True)
            others = sorted(self._path.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
            for old in others[:-MOST_PROFILES]:
                old.unlink()


def _between(values: list[tuple[int, float]], rows: int, *, beyond: bool) -> float:
    """Linear between known numbers of rows; outside of them in proportion (``beyond``), or as at the nearest."""
    at = bisect_left(values, (rows, -math.inf))
    if at < len(values) and values[at][0] == rows:
        return values[at][1]
    if 0 < at < len(values):
        (n, low), (m, high) = values[at - 1], values[at]
        return low + (high - low) * (rows - n) / (m - n)
    nearest, value = values[min(at, len(values) - 1)]
    return value * rows / nearest if beyond else value


def profile_of(network: MultiExitNetwork, runtime: str) -> Profile:
    """The profile of a network on a runtime on this machine, empty; its file is in the user's cache folder.

    What it is kept by: processor, usable cores, threads, GPU; names and shapes of the weights (a network that was
    trained further takes as long as before), size of the image and how it is seen; runtime; versions of CrowdExit and
    of what runs networks.
    """
    weights = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        weights.update(f"{name} {tuple(tensor.shape)}\n".encode())
    key = {
        **machine(),
        "weights": weights.hexdigest(),
        "size": list(network.config.size),
        "view": network.config.view,
        "runtime": runtime,
        "versions": [torch.__version__, *map(installed_version, ("crowdexit", "openvino", "onnxruntime"))],
    }
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder()
    return Profile(None if folder is None else folder / "profiles" / f"{name}.json", key)


def machine() -> dict[str, Any]:
    """This machine in words: its processor, the cores and threads that may be used, its GPU or None."""
    return {
        "processor": processor()[0],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu_name() or None,
    }
