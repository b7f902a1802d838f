"""Eager PyTorch, on the CPU or a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import ExitOutput, Features
from crowdexit.runtimes import cancel
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.base import ReadyChain, Runtime, register_runtime


@register_runtime("eager", "eager-bf16", "cuda", "cuda-bf16", "cuda-half")
class Eager(Runtime):
    """Eager PyTorch, channels last, in float32, bfloat16, or on a GPU float16.

    Raises:
        RuntimeUnavailable: if there is no GPU.
    """

    automatic = True
    runs_network = True

    def __init__(self, name: str = "eager") -> None:
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise RuntimeUnavailable(f"the runtime {name!r} needs a CUDA GPU; none found")
        self.name = name
        self.device = torch.device("cuda" if name.startswith("cuda") else "cpu")
        self.half = {"bf16": torch.bfloat16, "half": torch.float16}.get(name.rpartition("-")[2])

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        network.eval()
        # Move only what is needed: another thread may be running it.
        numbers = [*network.parameters(), *network.buffers()]
        with _on(self.device):
            if any(tensor.device.type != self.device.type for tensor in numbers):
                network.to(self.device)
            if not all(
                tensor.is_contiguous(memory_format=torch.channels_last) for tensor in numbers if tensor.dim() == 4
            ):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return EagerChain(network, self.name, self.device, self.half)


@contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Convert GPU errors (memory, unsupported hardware) to one line.

    Raises:
        RuntimeUnavailable: for any PyTorch error on a GPU.
    """
    try:
        yield
    except RuntimeError as error:
        if device.type == "cpu":
            raise
        line = str(error).partition("\n")[0]  # hints at environment variables follow
        raise RuntimeUnavailable(f"the GPU cannot run it: {line[:200]}") from None


class _CancelMode(TorchFunctionMode):
    """Checks for cancellation before every PyTorch function, about once a layer."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cancel.check()
        return func(*args, **(kwargs or {}))


def _may_be_cancelled() -> Any:
    return _CancelMode() if cancel.may_be_cancelled() else nullcontext()


class EagerChain(ReadyChain):
    """The network itself as a chain.

    Args:
        half: the type in which the heavy products run under autocast, or None.
    """

    def __init__(self, network: MultiExitNetwork, runtime: str, device: torch.device, half: torch.dtype | None) -> None:
        super().__init__(network, runtime)
        self.device, self.half = device, half

    @contextmanager
    def _mode(self) -> Iterator[None]:
        half = self.half
        with (
            _on(self.device),
            torch.inference_mode(),
            torch.autocast(self.device.type, half, enabled=half is not None),
        ):
            yield

    def begin(self, features: Features) -> Features:
        with _on(self.device):
            return Features(
                features.visual.to(self.device).contiguous(memory_format=torch.channels_last),
                features.log_mel.to(self.device),
                features.has_audio.to(self.device),
                features.valid_mask.to(self.device),
            )

    def advance(self, index: int, state: Features) -> Features:
        with self._mode(), _may_be_cancelled():
            state = self.network.advance(index, state)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return state

    def run_exit(self, name: str, state: Features) -> ExitOutput:
        with self._mode():
            with _may_be_cancelled():
                answer = self.network.run_exit(name, state)
            density = None if answer.density is None else answer.density.float().cpu()
            return replace(answer, value=answer.value.float().cpu(), density=density)

    def select(self, state: Features, keep: Tensor) -> Features:
        with self._mode():
            return state.select(keep.to(self.device))

    def visual_of(self, state: Features) -> tuple[Tensor, Tensor]:
        return state.visual, state.valid_mask
