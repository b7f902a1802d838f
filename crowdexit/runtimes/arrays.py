"""The chain between plain arrays: what runs exported stages, without PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError

# The tensors of crowdexit.models.stages.Features that are set, by the names of their fields.
Record = dict[str, NDArray[Any]]
# Those fields, and those of crowdexit.models.stages.ExitOutput, in their order: that of every piece's ports.
FEATURE_FIELDS = ("visual", "log_mel", "has_audio", "valid_mask", "audio", "shortcut")
IMAGE_FIELDS = ("visual", "valid_mask")  # whose maps have sides that follow the image's
OUTPUT_FIELDS = ("value", "density")


class RuntimeUnavailable(CrowdExitError):
    """A runtime that there is not, that is not installed, or that cannot run this network here."""


@dataclass(frozen=True)
class Port:
    """One array that goes into a piece or comes out of it.

    Attributes:
        name: of the record's field; of an exit's answer ``value`` or ``density``.
        dtype: ``float32`` or ``bool``.
        shape: of one sample, without the batch that comes first, at the network's own image size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Ports:
    """All that a piece, a stage or an exit, takes from the record, and all that it gives."""

    takes: tuple[Port, ...]
    gives: tuple[Port, ...]

    def names(self) -> tuple[list[str], list[str]]:
        """What a model's inputs and outputs are called: a stage may give anew what it takes, under another name."""
        return [port.name for port in self.takes], [f"given_{port.name}" for port in self.gives]


@dataclass(frozen=True)
class ArrayOutput:
    """What an exit says of a batch: ``value`` B or B×K, ``density`` B×1×h×w or None; float32."""

    value: NDArray[Any]
    density: NDArray[Any] | None = None


class Engine(Protocol):
    """Runs pieces by their names."""

    def run(self, piece: str, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """What a piece gives for what it takes, both in the order of its ports. The arrays are the caller's own."""

    def prepare(self, piece: str, shapes: Sequence[tuple[int, ...]]) -> None:
        """Make a piece ready for arrays whose shapes without the batch are these, so that no run has to."""


def stage_piece(index: int) -> str:
    """The name of a stage as a piece."""
    return f"stage-{index}"


def exit_piece(name: str) -> str:
    """The name of an exit as a piece."""
    return f"exit-{name}"


def is_exit(piece: str) -> bool:
    """Whether a piece is an exit."""
    return piece.startswith("exit-")


def _scaled(port: Port, scale: tuple[float, float]) -> tuple[int, ...]:
    """A port's shape; a map's follows the image's."""
    if port.name not in IMAGE_FIELDS or len(port.shape) != 3:
        return port.shape
    channels, height, width = port.shape
    return channels, round(height * scale[1]), round(width * scale[0])


class ArrayChain:
    """Stages and exits that an engine runs, as a chain (:class:`crowdexit.models.chain.Chain`) over records.

    Args:
        exits: the index of the stage after which each stands, by name, in the order in which they answer.
        ports: of every piece.
    """

    def __init__(self, exits: Mapping[str, int], ports: Mapping[str, Ports], engine: Engine) -> None:
        self.exit_names = list(exits)
        self._stage_of = dict(exits)
        self._ports = dict(ports)
        self._engine = engine
        # What a record has to hold after each stage: what nobody takes any more is let go.
        self._needed_after: list[set[str]] = []
        needed: set[str] = set()
        for index in reversed(range(max(exits.values()) + 1)):
            for name in exits:
                if exits[name] == index:
                    needed = needed | {port.name for port in ports[exit_piece(name)].takes}
            self._needed_after.insert(0, needed)
            stage = ports[stage_piece(index)]
            needed = needed - {port.name for port in stage.gives} | {port.name for port in stage.takes}

    def stage_of(self, name: str) -> int:
        """The index of the stage after which an exit stands."""
        return self._stage_of[name]

    def advance(self, index: int, state: Record) -> Record:
        """Run one stage."""
        state = {**state, **self._run(stage_piece(index), state)}
        return {name: array for name, array in state.items() if name in self._needed_after[index]}

    def run_exit(self, name: str, state: Record) -> ArrayOutput:
        """Run one exit on what its stage handed over."""
        return ArrayOutput(**self._run(exit_piece(name), state))

    def prepare(self, exits: Collection[str], scale: tuple[float, float] = (1.0, 1.0)) -> None:
        """Make ready all that leads to some exits, for images of the network's own size.

        Args:
            scale: of the width and the height of the images over the network's own, if it takes any size.
        """
        last = max((self._stage_of[name] for name in exits), default=-1)
        for piece in (*map(stage_piece, range(last + 1)), *map(exit_piece, exits)):
            self._engine.prepare(piece, tuple(_scaled(port, scale) for port in self._ports[piece].takes))

    def select(self, state: Record, keep: NDArray[Any]) -> Record:
        """The record of some samples only: ``keep`` is a bool mask or indices over the batch."""
        return {name: array[keep] for name, array in state.items()}

    def _run(self, piece: str, state: Record) -> Record:
        ports = self._ports[piece]
        given = self._engine.run(piece, [state[port.name] for port in ports.takes])
        if len(given) != len(ports.gives):
            raise RuntimeUnavailable(f"{piece} returns {len(given)} arrays, not {len(ports.gives)}")
        return {port.name: array for port, array in zip(ports.gives, given, strict=True)}
