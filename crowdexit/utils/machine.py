"""What the project has to know of the machine it runs on: its processor, and where the user's caches are."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path


def cache_folder() -> Path | None:
    """The user's cache of this project, perhaps not there yet; None where there is no home to keep anything in."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with suppress(RuntimeError):
        return (named if named.is_absolute() else Path.home() / ".cache") / "crowdexit"
    return None


def processor() -> tuple[str, str]:
    """The processor's name, and its abilities: clouds give one name to several processors."""
    known: dict[str, str] = {}
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").partition("\n\n")[0]
        for line in first.splitlines():
            key, _, value = line.partition(":")
            known[key.strip()] = value.strip()
    name = known.get("model name") or platform.processor() or platform.machine()
    return name, known.get("flags") or known.get("Features", "")  # of x86, of ARM


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware; without, it is slower than float32 by far."""
    return not {"amx_bf16", "avx512_bf16", "bf16"}.isdisjoint(processor()[1].split())
