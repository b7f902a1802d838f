"""How a network is run: precision, memory layout, device and engine behind one small interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from crowdexit.errors import CrowdExitError
from crowdexit.network import MultiExitNetwork, walk
from crowdexit.stages import Answer, Features


class RuntimeUnavailable(CrowdExitError):
    """A runtime that there is not, or not on this machine."""


class ReadyChain(ABC):
    """A network made ready on one runtime: a chain (:class:`crowdexit.network.Chain`) that takes :class:`Features`.

    What stands between two stages belongs to the runtime: only ``begin`` makes it, only ``select`` takes samples
    out of it. Answers are on the CPU, float32.

    Attributes:
        network: what it was made of. runtime: the name of what runs it.
    """

    def __init__(self, network: MultiExitNetwork, runtime: str) -> None:
        self.network = network
        self.runtime = runtime
        self.exit_names = network.exit_names
        self.stage_of = network.stage_of

    @abstractmethod
    def begin(self, features: Features) -> Any:
        """A batch as it stands before the first stage."""

    @abstractmethod
    def advance(self, index: int, state: Any) -> Any:
        """Run one stage to its end: what is begun after it has the machine to itself."""

    @abstractmethod
    def ask(self, name: str, state: Any) -> Answer:
        """Run one exit on what its stage handed over."""

    @abstractmethod
    def select(self, state: Any, keep: Tensor) -> Any:
        """The state of some samples only: ``keep`` is a bool mask or indices over the batch."""

    def stream(
        self, features: Features, exits: Collection[str] | None = None, proceed: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[str, Answer]]:
        """Each wanted exit's answer to a batch as soon as it is there; see :func:`crowdexit.network.walk`."""
        return walk(self, self.begin(features), exits, proceed)


class Runtime(ABC):
    """A way to run networks.

    Attributes:
        name: as users name it.
    """

    name: str

    @abstractmethod
    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        """Make a network ready to be run: its weights brought where and how this runtime wants them."""


class Eager(Runtime):
    """Eager PyTorch, channels last, on the CPU or a GPU, in float32 or bfloat16."""

    NAMES = ("eager", "eager-bf16", "cuda", "cuda-bf16")

    def __init__(self, name: str = "eager") -> None:
        self.name = name
        self.device = torch.device("cuda" if name.startswith("cuda") else "cpu")
        self.bf16 = name.endswith("bf16")

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        network.eval().to(self.device)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return _EagerChain(network, self)


class _EagerChain(ReadyChain):
    def __init__(self, network: MultiExitNetwork, how: Eager) -> None:
        super().__init__(network, how.name)
        self.device, self.bf16 = how.device, how.bf16

    @contextmanager
    def _mode(self) -> Iterator[None]:
        with torch.inference_mode(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            yield

    def begin(self, features: Features) -> Features:
        return Features(
            features.visual.to(self.device).contiguous(memory_format=torch.channels_last),
            features.log_mel.to(self.device),
            features.heard.to(self.device),
            features.inside.to(self.device),
        )

    def advance(self, index: int, state: Features) -> Features:
        with self._mode():
            state = self.network.advance(index, state)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return state

    def ask(self, name: str, state: Features) -> Answer:
        with self._mode():
            answer = self.network.ask(name, state)
        density = None if answer.density is None else answer.density.float().cpu()
        return replace(answer, value=answer.value.float().cpu(), density=density)

    def select(self, state: Features, keep: Tensor) -> Features:
        with self._mode():
            return state.select(keep.to(self.device))


def names() -> tuple[str, ...]:
    """All runtimes by name, ``auto`` first."""
    return ("auto", *Eager.NAMES)


def pick(name: str) -> Runtime:
    """The runtime of that name; ``auto``: a GPU where there is one, bfloat16 where the CPU multiplies in it
    (AMX, AVX512-BF16), else float32.

    Raises:
        RuntimeUnavailable: for an unknown name, or a GPU that is not there.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return Eager("cuda-bf16")
        multiplies = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return Eager("eager-bf16" if multiplies else "eager")
    if name not in names():
        raise RuntimeUnavailable(f"no runtime {name!r} (there are {', '.join(names())})")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeUnavailable(f"the runtime {name!r} needs a CUDA GPU, and there is none")
    return Eager(name)
