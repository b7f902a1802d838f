"""A network taken apart: every stage and every exit as a module between plain tensors.

That is what compilers take. Which fields of the record a piece reads and which it sets is found by watching it run
once on tensors that have a shape and no numbers.
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
from crowdexit.runtimes.arrays import IMAGE_FIELDS, ArrayChain, Engine, Port, Ports, Record, exit_piece, stage_piece
from crowdexit.runtimes.engines import Shapes


class Piece(nn.Module):
    """A stage or an exit between plain tensors: those that it takes from the record, and those that it gives.

    Attributes:
        ports: both, in order.
        token_grid: of the record that comes in, for it is no tensor.
        token_grid_after: of the record that goes out.
        any_size: whether its graph, made at one image size, holds for all.
    """

    def __init__(
        self,
        module: Stage | Exit,
        ports: Ports,
        token_grid: tuple[int, int] | None,
        token_grid_after: tuple[int, int] | None,
        *,
        any_size: bool = False,
    ) -> None:
        super().__init__()
        self.module = module
        self.ports = ports
        self.any_size = any_size
        self.token_grid, self.token_grid_after = token_grid, token_grid_after

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        record: dict[str, Any] = dict.fromkeys(("visual", "log_mel", "has_audio", "valid_mask"))
        record |= {port.name: tensor for port, tensor in zip(self.ports.takes, tensors, strict=True)}
        given = self.module(Features(**record, token_grid=self.token_grid))
        return tuple(getattr(given, port.name) for port in self.ports.gives)

    def open_sides(self) -> list[tuple[int, ...]]:
        """Of each tensor that it takes, the dimensions after the batch whose lengths follow the image's size."""
        follows = self.any_size
        return [(2, 3) if follows and port.name in IMAGE_FIELDS else () for port in self.ports.takes]

    def examples(self, shapes: Shapes | None = None, batch: int = 1) -> tuple[Tensor, ...]:
        """Tensors of ones that it takes; ``shapes`` without the batch, default: at the network's own image size."""
        wanted = shapes or tuple(port.shape for port in self.ports.takes)
        return tuple(
            torch.ones(batch, *shape, dtype=getattr(torch, port.dtype))
            for port, shape in zip(self.ports.takes, wanted, strict=True)
        )


def takes_any_size(network: MultiExitNetwork) -> bool:
    """Whether pieces' graphs, made at one image size, hold for all."""
    return network.config.view == "scale"


def take_apart(network: MultiExitNetwork) -> dict[str, Piece]:
    """All pieces of a network by name, in the order in which they run; the network is put in evaluation mode."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, and not wanted where all is cached

    network.eval()
    width, height = network.config.size
    pieces: dict[str, Piece] = {}
    any_size = takes_any_size(network)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        state = inputs(torch.empty(1, 3, height, width), torch.empty(1, 1, 96, 64))
        for index in range(len(network.stages)):
            stage: Any = network.stages[index]
            pieces[stage_piece(index)], state = _watched(stage, state, any_size)
            for name in network.exit_names:
                if network.stage_of(name) == index:
                    pieces[exit_piece(name)], _ = _watched(network.exit_module(name), state, any_size)
    return pieces


def record_of(features: Features) -> Record:
    """A batch before the first stage as arrays; where these lie in order, they share its memory."""
    return {name: tensor.contiguous().numpy() for name, tensor in _tensors(features).items()}


def chain_of(network: MultiExitNetwork, ports: Mapping[str, Ports], engine: Engine) -> ArrayChain:
    """The pieces of a network that an engine runs, by their ports."""
    exits = {name: network.stage_of(name) for name in network.exit_names}
    return ArrayChain(exits, ports, engine)


def _watched(module: Stage | Exit, state: Features, any_size: bool) -> tuple[Piece, Any]:
    """The module as a piece, and what it gives."""
    before = _tensors(state)
    with _Touched(before.values()) as touched:
        given = module(state)
    after = _tensors(given)
    takes = tuple(_port(name, tensor) for name, tensor in before.items() if touched.has(tensor))
    gives = tuple(_port(name, tensor) for name, tensor in after.items() if before.get(name) is not tensor)
    grid_after = given.token_grid if isinstance(given, Features) else None
    return Piece(module, Ports(takes, gives), state.token_grid, grid_after, any_size=any_size), given


class _Touched(TorchFunctionMode):
    """Notes which of some tensors any function of PyTorch is given."""

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


def _port(name: str, tensor: Tensor) -> Port:
    return Port(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape[1:]))
