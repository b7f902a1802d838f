"""Runtimes by name, and the choice among them."""

from __future__ import annotations

import logging
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crowdexit.inference.batch import look
from crowdexit.inference.runtimes.arrays import RuntimeUnavailable
from crowdexit.inference.runtimes.base import ReadyChain, Runtime
from crowdexit.inference.runtimes.calibration import sample
from crowdexit.inference.runtimes.compiled import Compiled
from crowdexit.inference.runtimes.eager import Eager
from crowdexit.inference.runtimes.kept import choices, fingerprint, installed_version, keep_choice
from crowdexit.inference.runtimes.onnx import Onnx
from crowdexit.inference.runtimes.openvino import OpenVINO, multiplies_bf16
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import Features

log = logging.getLogger(__name__)

KINDS: tuple[Any, ...] = (Eager, Compiled, OpenVINO, Onnx)
# An exit's answer may differ from that of eager float32 by this share of it, and of one head or one class score.
TOLERANCE = 0.02
PROBES = 3
PATIENCE_S = 20.0  # then no further candidate is tried


def names() -> tuple[str, ...]:
    """All runtimes by name, ``auto`` first."""
    return ("auto", *(name for kind in KINDS for name in kind.NAMES))


def pick(name: str) -> Runtime:
    """The runtime of that name; ``auto`` is :class:`Auto`.

    Raises:
        RuntimeUnavailable: for an unknown name, one that is not installed, or a GPU that is not there.
    """
    if name == "auto":
        return Auto()
    kind = next((kind for kind in KINDS if name in kind.NAMES), None)
    if kind is None:
        raise RuntimeUnavailable(f"no runtime {name!r} (there are {', '.join(names())})")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeUnavailable(f"the runtime {name!r} needs a CUDA GPU, and there is none")
    runtime: Runtime = kind(name)
    return runtime


class Auto(Runtime):
    """The fastest runtime that agrees with eager float32 on a picture: tried once for a machine and a network.

    Tried are those that need no preparing of their own: neither torch.compile, which wants a C++ compiler and a
    minute, nor int8, which wants pictures. What was picked is told once, as a warning of the log, and remembered in
    the user's cache.
    """

    name = "auto"

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        key = _key(network)
        known = choices().get(key)
        if known in names():
            try:
                return pick(known).ready(network)
            except RuntimeUnavailable as error:
                log.warning("%s; the runtimes are tried anew", error)
        picked, chain = _fastest(network)
        keep_choice(key, picked)
        return chain


def candidates() -> tuple[tuple[str, ...], ...]:
    """What to try here beside eager float32: of each row, the quickest first, the first that agrees."""
    if torch.cuda.is_available():
        return (("cuda-half", "cuda-bf16", "cuda"),)
    rows: list[tuple[str, ...]] = []
    if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported():
        rows.append(("eager-bf16",))
    if installed_version("openvino"):
        rows.append(("openvino-bf16", "openvino") if multiplies_bf16() else ("openvino",))
    elif installed_version("onnxruntime"):
        rows.append(("onnx",))
    return tuple(rows)


def _fastest(network: MultiExitNetwork) -> tuple[str, ReadyChain]:
    """The name of the fastest runtime that agrees with eager float32, and the network on it."""
    begun = time.perf_counter()
    picked, chain = "eager", Eager().ready(network)
    rows = candidates()
    if not rows:
        return picked, chain
    features = look(*sample(), network.config)
    expected, plain = _tried(chain, features)
    least = plain
    for row in rows:
        for name in row:
            if time.perf_counter() - begun > PATIENCE_S:
                continue
            try:
                other = pick(name).ready(network)
                answers, seconds = _tried(other, features)
            except RuntimeUnavailable as error:
                log.warning("runtime auto leaves out %s: %s", name, error)
                continue
            if not _agree(answers, expected):
                continue
            if seconds < least:
                picked, chain, least = name, other, seconds
            break
    if isinstance(kind := pick(picked), Eager):  # what was tried in between may have moved the weights
        chain = kind.ready(network)
    log.warning("runtime auto: %s, %.0f ms a picture here (eager %.0f ms)", picked, 1e3 * least, 1e3 * plain)
    return picked, chain


def _tried(chain: ReadyChain, features: Features) -> tuple[dict[str, Tensor], float]:
    """The answers of the final exit and some early ones, and the median of the seconds that they take."""
    *early, final = chain.exit_names
    exits = [*early[:: max(1, len(early) // 3)][:3], final]
    answers = dict(chain.stream(features, exits))  # once for nothing: this compiles
    times = []
    for _ in range(PROBES):
        begun = time.perf_counter()
        answers = dict(chain.stream(features, exits))
        times.append(time.perf_counter() - begun)
    return {name: answer.value for name, answer in answers.items()}, sorted(times)[PROBES // 2]


def _agree(answers: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(
        float((answers[name] - value).abs().max()) <= TOLERANCE * (float(value.abs().max()) + 1)
        for name, value in expected.items()
    )


def _key(network: MultiExitNetwork) -> str:
    """A hash of everything that decides which runtime is fastest: machine, libraries, network and weights."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return fingerprint(network, _cpu(), os.cpu_count(), torch.get_num_threads(), gpu)


def _cpu() -> str:
    """The processor's name and abilities; clouds give one name to several."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
        return "".join(line for line in first.splitlines() if line.startswith(("model name", "flags")))
    return platform.processor()
