"""Run exported stages and exits on NumPy arrays, without PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from crowdexit.errors import CrowdExitError

# The tensors of crowdexit.models.stages.Features that are set, by the names of their fields.
Record = dict[str, NDArray[Any]]
# Those fields, and those of crowdexit.models.stages.ExitOutput, in the order of every signature.
FEATURE_FIELDS = ("visual", "log_mel", "has_audio", "valid_mask", "audio", "shortcut")
IMAGE_FIELDS = ("visual", "valid_mask")  # whose maps have sides that follow the image's
OUTPUT_FIELDS = ("value", "density")


class RuntimeUnavailable(CrowdExitError):
    """A runtime that is unknown, not installed, or cannot run this network here."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output array of a subgraph.

    Attributes:
        name: of the record's field; of an exit's output ``value`` or ``density``.
        dtype: ``float32`` or ``bool``.
        shape: of one sample, without the batch that comes first, at the network's own image size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a subgraph (a stage or an exit)."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def names(self) -> tuple[list[str], list[str]]:
        """Names of a model's inputs and outputs; outputs have a prefix, as a stage may replace its inputs."""
        return [spec.name for spec in self.inputs], [f"given_{spec.name}" for spec in self.outputs]


@dataclass(frozen=True)
class ArrayOutput:
    """Output of an exit for a batch: ``value`` B or B×K, ``density`` B×1×h×w or None; float32."""

    value: NDArray[Any]
    density: NDArray[Any] | None = None


class Engine(Protocol):
    """Runs subgraphs by name."""

    def run(self, subgraph: str, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Run a subgraph; inputs and outputs in the order of its signature. The caller owns the arrays."""

    def prepare(self, subgraph: str, shapes: Sequence[tuple[int, ...]]) -> None:
        """Prepare a subgraph for inputs of these shapes (without the batch)."""


def stage_subgraph(index: int) -> str:
    """The name of the subgraph of a stage."""
    return f"stage-{index}"


def exit_subgraph(name: str) -> str:
    """The name of the subgraph of an exit."""
    return f"exit-{name}"


def is_exit(subgraph: str) -> bool:
    """Whether a subgraph is an exit."""
    return subgraph.startswith("exit-")


def _scaled(spec: TensorSpec, scale: tuple[float, float]) -> tuple[int, ...]:
    """A tensor's shape; maps scale with the image."""
    if spec.name not in IMAGE_FIELDS or len(spec.shape) != 3:
        return spec.shape
    channels, height, width = spec.shape
    return channels, round(height * scale[1]), round(width * scale[0])


class ArrayChain:
    """Stages and exits that an engine runs, as a chain (:class:`crowdexit.models.chain.Chain`) over records.

    Args:
        exits: the index of the stage before each exit, by name, in their order.
        signatures: of every subgraph.
    """

    def __init__(self, exits: Mapping[str, int], signatures: Mapping[str, Signature], engine: Engine) -> None:
        self.exit_names = list(exits)
        self._stage_of = dict(exits)
        self._signatures = dict(signatures)
        self._engine = engine
        # Fields that are still needed after each stage; the others are dropped.
        self._needed_after: list[set[str]] = []
        needed: set[str] = set()
        for index in reversed(range(max(exits.values()) + 1)):
            for name in exits:
                if exits[name] == index:
                    needed = needed | {spec.name for spec in signatures[exit_subgraph(name)].inputs}
            self._needed_after.insert(0, needed)
            stage = signatures[stage_subgraph(index)]
            needed = needed - {spec.name for spec in stage.outputs} | {spec.name for spec in stage.inputs}

    def stage_of(self, name: str) -> int:
        """The index of the stage before an exit."""
        return self._stage_of[name]

    def advance(self, index: int, state: Record) -> Record:
        """Run one stage."""
        state = {**state, **self._run(stage_subgraph(index), state)}
        return {name: array for name, array in state.items() if name in self._needed_after[index]}

    def run_exit(self, name: str, state: Record) -> ArrayOutput:
        """Run one exit on the output of its stage."""
        return ArrayOutput(**self._run(exit_subgraph(name), state))

    def prepare(self, exits: Collection[str], scale: tuple[float, float] = (1.0, 1.0)) -> None:
        """Prepare the stages up to some exits, and these, for images of the network's size.

        Args:
            scale: of the width and the height of the images over the network's own, if it takes any size.
        """
        last = max((self._stage_of[name] for name in exits), default=-1)
        for subgraph in (*map(stage_subgraph, range(last + 1)), *map(exit_subgraph, exits)):
            self._engine.prepare(subgraph, tuple(_scaled(spec, scale) for spec in self._signatures[subgraph].inputs))

    def select(self, state: Record, keep: NDArray[Any]) -> Record:
        """The record of some samples only: ``keep`` is a bool mask or indices over the batch."""
        return {name: array[keep] for name, array in state.items()}

    def _run(self, subgraph: str, state: Record) -> Record:
        signature = self._signatures[subgraph]
        given = self._engine.run(subgraph, [state[spec.name] for spec in signature.inputs])
        if len(given) != len(signature.outputs):
            raise RuntimeUnavailable(f"{subgraph} returns {len(given)} arrays, not {len(signature.outputs)}")
        return {spec.name: array for spec, array in zip(signature.outputs, given, strict=True)}
