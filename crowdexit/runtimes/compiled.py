"""torch.compile: every stage and exit compiled separately."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import ExitOutput, Features
from crowdexit.runtimes import cancel
from crowdexit.runtimes.arrays import RuntimeUnavailable, exit_subgraph, stage_subgraph
from crowdexit.runtimes.base import ReadyChain, Runtime, register_runtime
from crowdexit.runtimes.batch import make_batch
from crowdexit.runtimes.eager import EagerChain
from crowdexit.runtimes.subgraphs import Subgraph, partition


@register_runtime("compile", "compile-bf16")
class Compiled(Runtime):
    """torch.compile on the CPU, in float32 or bfloat16; needs a C++ compiler and time to compile.

    A subgraph is compiled for the first size and, at the second, for batches and images of any size.
    """

    def __init__(self, name: str = "compile") -> None:
        self.name = name

    def ready(self, network: MultiExitNetwork) -> ReadyChain:
        network.eval().cpu()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return _CompiledChain(network, self.name)


class _CompiledChain(EagerChain):
    def __init__(self, network: MultiExitNetwork, runtime: str) -> None:
        half = torch.bfloat16 if runtime.endswith("bf16") else None
        super().__init__(network, runtime, torch.device("cpu"), half)
        self._subgraphs = partition(network)
        self._compiled: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            name: torch.compile(_own_forward(name, subgraph)) for name, subgraph in self._subgraphs.items()
        }

    def prepare(self, exits: Collection[str], size: tuple[int, int] | None = None) -> None:
        """Compile the stages up to some exits by running a blank image."""
        width, height = self.network.config.scene if size is None else size
        blank = make_batch(np.zeros((height, width, 3), np.uint8), None, self.network.config)
        for _ in self.stream(blank, exits):
            pass

    def advance(self, index: int, state: Features) -> Features:
        name = stage_subgraph(index)
        return replace(state, **self._run(name, state), token_grid=self._subgraphs[name].token_grid_after)

    def run_exit(self, name: str, state: Features) -> ExitOutput:
        given = self._run(exit_subgraph(name), state)
        return ExitOutput(**{key: tensor.float() for key, tensor in given.items()})

    def _run(self, name: str, state: Features) -> dict[str, Any]:
        signature = self._subgraphs[name].signature
        cancel.check()  # compiled code cannot be interrupted
        try:
            with self._mode():
                given = self._compiled[name](*(getattr(state, spec.name) for spec in signature.inputs))
        except torch._dynamo.exc.TorchDynamoException as error:
            line = " ".join(str(error).split("\n", 2)[:2])  # the first line names the problem; Dynamo hints follow
            raise RuntimeUnavailable(f"torch.compile cannot compile {name}: {line[:200]}") from None
        return {spec.name: tensor for spec, tensor in zip(signature.outputs, given, strict=True)}


def _own_forward(name: str, subgraph: Subgraph) -> Callable[..., tuple[Tensor, ...]]:
    """A copy of ``forward`` for one subgraph: Dynamo tracks recompilations and dynamic sizes by code object."""
    shared = Subgraph.forward
    own = FunctionType(shared.__code__.replace(co_name=name), shared.__globals__, name)
    bound: Callable[..., tuple[Tensor, ...]] = own.__get__(subgraph)
    return bound
