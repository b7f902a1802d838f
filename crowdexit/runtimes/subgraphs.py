"""Partition a network into subgraphs: every stage and exit as a module between plain tensors, as compilers expect.

The inputs and outputs of a subgraph are found by running it once on fake tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import Exit, ExitOutput, Features, Stage, inputs
from crowdexit.runtimes.arrays import (
    IMAGE_FIELDS,
    ArrayChain,
    Engine,
    Record,
    Signature,
    TensorSpec,
    exit_subgraph,
    stage_subgraph,
)
from crowdexit.runtimes.engines import Shapes


class Subgraph(nn.Module):
    """A stage or an exit as a module from tensors to tensors.

    Attributes:
        signature: its inputs and outputs, in order.
        token_grid, token_grid_after: of the record before and after it.
        any_size: whether a graph traced at one image size is valid for all.
    """

    def __init__(
        self,
        module: Stage | Exit,
        signature: Signature,
        token_grid: tuple[int, int] | None,
        token_grid_after: tuple[int, int] | None,
        *,
        any_size: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.signature = signature
        self.any_size = any_size
        self.token_grid, self.token_grid_after = token_grid, token_grid_after

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        record: dict[str, Any] = dict.fromkeys(("visual", "log_mel", "has_audio", "valid_mask"))
        record |= {spec.name: tensor for spec, tensor in zip(self.signature.inputs, tensors, strict=True)}
        given = self.module(Features(**record, token_grid=self.token_grid))
        return tuple(getattr(given, spec.name) for spec in self.signature.outputs)

    def open_sides(self) -> list[tuple[int, ...]]:
        """For each input, the dimensions that depend on the image size."""
        follows = self.any_size
        return [(2, 3) if follows and spec.name in IMAGE_FIELDS else () for spec in self.signature.inputs]

    def examples(self, shapes: Shapes | None = None, batch: int = 1) -> tuple[Tensor, ...]:
        """Example inputs (ones); ``shapes`` without the batch, default: those of the network's image size."""
        wanted = shapes or tuple(spec.shape for spec in self.signature.inputs)
        return tuple(
            torch.ones(batch, *shape, dtype=getattr(torch, spec.dtype))
            for spec, shape in zip(self.signature.inputs, wanted, strict=True)
        )


def takes_any_size(network: MultiExitNetwork) -> bool:
    """Whether subgraphs traced at one image size are valid for all."""
    return network.config.view == "scale"


def partition(network: MultiExitNetwork) -> dict[str, Subgraph]:
    """All subgraphs of a network by name, in the order in which they run; sets evaluation mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and not needed if all is cached

    network.eval()
    width, height = network.config.size
    subgraphs: dict[str, Subgraph] = {}
    any_size = takes_any_size(network)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state = inputs(torch.empty(1, 3, height, width), torch.empty(1, 1, 96, 64))
        for index in range(len(network.stages)):
            stage: Any = network.stages[index]
            subgraphs[stage_subgraph(index)], state = _watched(stage, state, any_size)
            for name in network.exit_names:
                if network.stage_of(name) == index:
                    subgraphs[exit_subgraph(name)], _ = _watched(network.exit_module(name), state, any_size)
    return subgraphs


def record_of(features: Features) -> Record:
    """A batch before the first stage as arrays; contiguous tensors share their memory."""
    return {name: tensor.contiguous().numpy() for name, tensor in _tensors(features).items()}


def chain_of(network: MultiExitNetwork, signatures: Mapping[str, Signature], engine: Engine) -> ArrayChain:
    """The chain of a network whose subgraphs an engine runs."""
    exits = {name: network.stage_of(name) for name in network.exit_names}
    return ArrayChain(exits, signatures, engine)


def _watched(module: Stage | Exit, state: Features, any_size: bool) -> tuple[Subgraph, Any]:
    """The module as a subgraph, and its output."""
    before = _tensors(state)
    with _Touched(before.values()) as touched:
        given = module(state)
    after = _tensors(given)
    input_specs = tuple(_spec(name, tensor) for name, tensor in before.items() if touched.has(tensor))
    output_specs = tuple(_spec(name, tensor) for name, tensor in after.items() if before.get(name) is not tensor)
    grid_after = given.token_grid if isinstance(given, Features) else None
    return Subgraph(
        module, Signature(input_specs, output_specs), state.token_grid, grid_after, any_size=any_size
    ), given


class _Touched(TorchFunctionMode):
    """Records which of some tensors PyTorch functions use."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._watched = {id(tensor) for tensor in tensors}
        self._used: set[int] = set()

    def has(self, tensor: Tensor) -> bool:
        return id(tensor) in self._used

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._used |= self._watched & {id(leaf) for leaf in tree_leaves((args, kwargs))}
        return func(*args, **(kwargs or {}))


def _tensors(record: Features | ExitOutput) -> dict[str, Tensor]:
    return {f.name: value for f in fields(record) if isinstance(value := getattr(record, f.name), Tensor)}


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
