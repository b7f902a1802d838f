"""How a network is run: precision, memory layout and device behind one small interface."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from crowdexit.errors import CrowdExitError
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import Answer, Features


class RuntimeUnavailable(CrowdExitError):
    """A runtime that there is not, or not on this machine."""


class Runtime:
    """Eager PyTorch, channels last, on the CPU or a GPU, in float32 or bfloat16."""

    _NAMES = ("eager", "eager-bf16", "cuda", "cuda-bf16")

    def __init__(self, name: str) -> None:
        self.name = name
        self.device = torch.device("cuda" if name.startswith("cuda") else "cpu")
        self.bf16 = name.endswith("bf16")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All runtimes by name, and ``auto``."""
        return ("auto", *cls._NAMES)

    @classmethod
    def pick(cls, name: str) -> Runtime:
        """The runtime of that name; ``auto``: a GPU where there is one, bfloat16 where the CPU multiplies in it
        (AMX, AVX512-BF16), else float32.

        Raises:
            RuntimeUnavailable: for an unknown name, or a GPU that is not there.
        """
        if name == "auto":
            if torch.cuda.is_available():
                return cls("cuda-bf16")
            multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
            return cls("eager-bf16" if multiplies else "eager")
        if name not in cls._NAMES:
            raise RuntimeUnavailable(f"no runtime {name!r} (there are {', '.join(cls.names())})")
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeUnavailable(f"the runtime {name!r} needs a CUDA GPU, and there is none")
        return cls(name)

    def prepare(self, network: MultiExitNetwork) -> None:
        """Bring the weights where and how this runtime wants them, once."""
        network.to(self.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def stream(
        self, network: MultiExitNetwork, features: Features, exits: Sequence[str]
    ) -> Iterator[tuple[str, Answer]]:
        """Walk the chain on this runtime; see :meth:`MultiExitNetwork.stream`."""
        moved = Features(
            features.visual.to(self.device).contiguous(memory_format=torch.channels_last),
            features.log_mel.to(self.device),
            features.heard.to(self.device),
            features.inside.to(self.device),
        )
        walk = network.stream(moved, exits)
        while True:
            # The contexts are entered for each step: a generator must not leave them open while it waits.
            with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                item = next(walk, None)
            if item is None:
                return
            name, answer = item
            density = None if answer.density is None else answer.density.cpu()
            yield name, replace(answer, value=answer.value.cpu(), density=density)
