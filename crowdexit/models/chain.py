"""A chain of stages with exits, and a plain walk along it, whatever runs the stages; knows nothing of PyTorch.

Here everybody goes all the way and nobody looks at a clock; who leaves where, and when, is
:mod:`crowdexit.inference.executor`'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Protocol, TypeVar

State = TypeVar("State")
Output = TypeVar("Output")
Output_co = TypeVar("Output_co", covariant=True)


class Chain(Protocol[State, Output_co]):
    """Stages and exits that are run one by one, wherever that is.

    A ``State`` is what a stage hands to the next; what an exit says is an answer, of tensors or of arrays.
    """

    @property
    def exit_names(self) -> list[str]:
        """All exits in the order in which they answer."""

    def stage_of(self, name: str) -> int:
        """The index of the stage after which an exit stands."""

    def advance(self, index: int, state: State) -> State:
        """Run one stage."""

    def run_exit(self, name: str, state: State) -> Output_co:
        """Run one exit on what its stage handed over."""


def iter_outputs(
    chain: Chain[State, Output],
    state: State,
    exits: Collection[str] | None = None,
) -> Iterator[tuple[str, Output]]:
    """Run a chain and yield each wanted exit's output as soon as it is there.

    Nothing behind the last wanted exit is computed, and nothing at all after the caller stops asking.

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
