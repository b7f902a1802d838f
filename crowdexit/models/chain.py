"""A chain of stages with exits, independent of the runtime and of PyTorch.

Here all samples run to the last exit; :mod:`crowdexit.inference.executor` handles early exits and deadlines.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol, TypeVar

State = TypeVar("State")
Output = TypeVar("Output")
Output_co = TypeVar("Output_co", covariant=True)


class Chain(Protocol[State, Output_co]):
    """Stages and exits that run one by one, on any runtime.

    A ``State`` is the output of a stage; exits return tensors or arrays.
    """

    @property
    def exit_names(self) -> list[str]:
        """All exits in their order."""

    def stage_of(self, name: str) -> int:
        """The index of the stage before an exit."""

    def advance(self, index: int, state: State) -> State:
        """Run one stage."""

    def run_exit(self, name: str, state: State) -> Output_co:
        """Run one exit on the output of its stage."""


def iter_outputs(
    chain: Chain[State, Output],
    state: State,
    exits: Collection[str] | None = None,
) -> Iterator[tuple[str, Output]]:
    """Run a chain and yield each wanted exit's output as soon as it is computed.

    Nothing after the last wanted exit is computed, nor after the caller stops iterating.

    Args:
        state: before the first stage.
        exits: names; default: all.
    """
    wanted = [name for name in chain.exit_names if exits is None or name in exits]
    if not wanted:
        return
    for index in range(chain.stage_of(wanted[-1]) + 1):
        state = chain.advance(index, state)
        for name in wanted:
            if chain.stage_of(name) == index:
                yield name, chain.run_exit(name, state)
