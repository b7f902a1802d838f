"""The machine that a benchmark runs on: what it is, and how fast it can multiply at all."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from math import nan
from pathlib import Path
from random import Random
from statistics import median, quantiles
from time import perf_counter
from typing import Any

import torch

from crowdexit.evaluation.files import write_files

PACKAGES = ("torch", "openvino", "onnxruntime")
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
    cpu = f"{machine['processor']}, {machine['cores']} cores ({' '.join(machine['instructions'])})"
    return "; ".join(filter(None, (machine["gpu"], cpu, packages)))


class Multiplier:
    """Plain matrix products in PyTorch, to tell what a machine can do at all: 2·side³ operations each.

    Args:
        dtype: float32, bfloat16, float16, or int8 (which adds up in int32), that by the faster of two ways: the one is
            for processors with instructions of their own for it, the other for those without.
    """

    def __init__(self, dtype: torch.dtype, device: str = "cpu", *, side: int = 2048, times: int = 4) -> None:
        self.flop = times * 2 * side**3
        self._times, self._device = times, device
        if dtype == torch.int8:
            self._a, self._b = torch.randint(-128, 127, (2, side, side), dtype=dtype, device=device)
            self._product: Callable[..., Any] = torch._int_mm
            if device == "cpu":
                self._product = min((torch._int_mm, _packed(self._b)), key=self._seconds)
        else:
            self._a, self._b = torch.randn(2, side, side, device=device).to(dtype)
            self._product = torch.mm

    def _seconds(self, product: Callable[..., Any]) -> float:
        product(self._a, self._b)
        begun = perf_counter()
        product(self._a, self._b)
        return perf_counter() - begun

    def __call__(self) -> None:
        for _ in range(self._times):
            self._product(self._a, self._b)
        finish(self._device)


def _packed(weights: torch.Tensor) -> Callable[..., Any]:
    """A product with such int8 weights as quantised networks of PyTorch's compute it: what it is given, times these."""
    by_row = torch._make_per_tensor_quantized_tensor(weights.T.contiguous(), 0.05, 0)
    packed = torch.ops.quantized.linear_prepack(by_row, None)
    taken: dict[int, torch.Tensor] = {}

    def multiply(a: torch.Tensor, _: torch.Tensor) -> Any:
        if id(a) not in taken:
            taken[id(a)] = torch._make_per_tensor_quantized_tensor((a.to(torch.int16) + 128).to(torch.uint8), 0.05, 128)
        return torch.ops.quantized.linear(taken[id(a)], packed, 1.0, 0)

    return multiply


def finish(device: str) -> None:
    """Wait for what a GPU is still at."""
    if device != "cpu":
        torch.cuda.synchronize()


class Times:
    """Seconds that several works took, measured in turn. Only their ratios mean something on a shared machine."""

    def __init__(self, seconds: Mapping[Any, Sequence[float]]) -> None:
        self._seconds = seconds

    def median(self, work: Hashable) -> float:
        """Seconds."""
        return median(self._seconds[work])

    def ratio(self, work: Hashable, other: Hashable) -> float:
        """How many times as long as another one took, the median of the rounds: what slowed one slowed both."""
        return median(self._ratios(work, other))

    def quartiles(self, work: Hashable, other: Hashable) -> tuple[float, float]:
        """Between which a half of the rounds' ratios lies."""
        low, _, high = quantiles(self._ratios(work, other), n=4) if len(self._seconds[work]) > 1 else [nan] * 3
        return low, high

    def _ratios(self, work: Hashable, other: Hashable) -> list[float]:
        pairs = zip(self._seconds[work], self._seconds[other], strict=True)
        return [mine / others for mine, others in pairs]


def in_turn(works: Mapping[Any, Callable[[], object]], rounds: int, least_s: float = 0.0) -> Times:
    """Run all of them once, then measure each in every round, in another order each time, so that none always runs
    after the largest, which leaves it cold caches.

    Args:
        rounds: at least; up to three times as many until ``least_s`` seconds have passed.
    """
    for work in works.values():
        work()
    names, orders = list(works), Random(0)
    seconds: dict[Hashable, list[float]] = {name: [] for name in names}
    end = perf_counter() + least_s
    for number in range(3 * rounds):
        if number >= rounds and perf_counter() > end:
            break
        for name in orders.sample(names, len(names)):
            begun = perf_counter()
            works[name]()
            seconds[name].append(perf_counter() - begun)
    return Times(seconds)


@contextmanager
def cache_of_its_own() -> Iterator[None]:
    """Let nothing of networks with random weights stay in the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        try:
            yield
        finally:
            os.environ.pop("XDG_CACHE_HOME")
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before


def keep(figures: Mapping[str, Any], path: Path | None) -> None:
    """Write figures as JSON, if they are wanted."""
    if path is not None:
        write_files(path.parent, {path.name: json.dumps(figures, indent=1) + "\n"})


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
