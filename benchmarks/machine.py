"""The machine that a benchmark runs on: what it is, and how fast it can multiply at all."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

PACKAGES = ("torch", "openvino", "onnxruntime", "nncf")
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe() -> dict[str, Any]:
    """Processor, cores, what it multiplies in, GPU, and the packages' versions: plain data."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": [name for name in _INSTRUCTIONS if name in _flags()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def in_a_line(machine: dict[str, Any]) -> str:
    """What :func:`describe` gave, for people."""
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    what = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores ({' '.join(machine['instructions'])})"
    return f"{what}; {packages}"


def matmul_rate(dtype: torch.dtype, device: str = "cpu", *, side: int = 2048, seconds: float = 1.0) -> float:
    """FLOP/s of a plain matrix product of that type in PyTorch, the best of as many as fit into the time."""
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    best, end = float("inf"), perf_counter() + seconds
    while perf_counter() < end or best == float("inf"):
        begun = perf_counter()
        a @ b
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, perf_counter() - begun)
    return 2 * side**3 / best


def in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median of the seconds that each takes, measured in turn; all of them run once beforehand.

    Only their ratios mean something on a shared machine.
    """
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            begun = perf_counter()
            work()
            times[name].append(perf_counter() - begun)
    return {name: median(values) for name, values in times.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpuinfo(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field)), "")


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _flags() -> list[str]:
    return _cpuinfo("flags").split()
