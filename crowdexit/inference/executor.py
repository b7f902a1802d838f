"""The walk of a single image and of many that may leave: stage by stage, and who has left costs nothing more.

A *sample* is what is counted (or classified); it is one row of a network's batch, or several where it is seen in
tiles. A *part* is the samples that go through a stage together. All parts go through a stage before any goes through
the next: early answers come early for all, and who goes on is decided as late as possible.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from crowdexit.inference.fair_lock import FairLock
from crowdexit.inference.profile import FIRST, Profile, exit_step, stage_step
from crowdexit.models.stages import ExitOutput
from crowdexit.runtimes.base import ReadyChain

T = TypeVar("T")
Mask = NDArray[np.bool_]


@dataclass
class Batch:
    """Some rows of the network's batch on their way.

    Attributes:
        state: what the last stage handed over; before the first, what makes the rows' input features.
        rows: how many.
        first_ms: what the first stage took; None before it, and where rows have left since.
    """

    state: Any
    rows: int
    first_ms: float | None = None


@dataclass(frozen=True)
class Part:
    """Samples that go through a stage together.

    Attributes:
        samples: their numbers (n,).
        views: how many rows each of them is (n,).
        batches: their rows in order; several batches only of a single sample with many rows.
    """

    samples: NDArray[np.intp]
    views: NDArray[np.intp]
    batches: list[Batch]


@dataclass(frozen=True)
class BatchExitOutput:
    """What an exit said of a part's samples.

    Attributes:
        exit: its name.
        samples: their numbers (n,).
        values: counts (n,), or class scores (n, K); of a sample with several rows the sum.
        density: of each sample a map for each of its rows (rows, h, w), from exits that make maps.
    """

    exit: str
    samples: NDArray[np.intp]
    values: NDArray[np.float32]
    density: list[NDArray[np.float32]] | None


class Policy(Protocol):
    """Decides in a walk which exits are asked, and who goes on."""

    def should_run_exit(self, exit: str, part: Part, executor: StageExecutor) -> bool:
        """Whether an exit is asked about a part that has just come to it."""

    def keep_at_stage(self, exit: str, part: Part, executor: StageExecutor) -> Mask:
        """Which of a part's samples (n,), just answered by an exit, are there for a further one of the same stage."""

    def keep_for_stage(self, stage: int, part: Part, executor: StageExecutor) -> Mask:
        """Which of a part's samples (n,) go through a stage; the others have left. Not asked of the first stage."""


@dataclass
class StageExecutor:
    """A walk of numbered samples through a chain, and what a policy may know of it.

    Attributes:
        chain: the network, made ready.
        size: how many samples there may be.
        exits: names that may be asked, in the order of the chain.
        profile: how long steps take; every step that is run with all its rows is noted.
        left_ms: the time until the deadline; negative after it.
        uncertainty: of an exit's outputs (n,), in the unit that the policy compares; default: unknown, inf.
        lock: held during every step: one step at a time on a chain, whichever threads walk it.
        earlier: what each exit has said of the samples' rows that went another walk before; it is added.
        feature_sums: of each sample by its number, added to by each of its rows after the first stage
            (:meth:`ReadyChain.feature_sums`); None: they are not wanted.
        clock: seconds.
        answered: which samples have an answer (size,).
        counts: their latest counts (size,); zero for classes.
        uncertainties: of their latest answers (size,); inf without one.
    """

    chain: ReadyChain
    size: int
    exits: Sequence[str]
    profile: Profile = field(default_factory=Profile)
    left_ms: Callable[[], float] = lambda: math.inf
    uncertainty: Callable[[BatchExitOutput], NDArray[np.float64]] = lambda output: np.full(
        len(output.samples), math.inf
    )
    lock: FairLock = field(default_factory=FairLock)
    earlier: Mapping[str, float] = field(default_factory=dict)
    feature_sums: dict[int, NDArray[np.float64]] | None = None
    clock: Callable[[], float] = time.perf_counter

    def __post_init__(self) -> None:
        self.answered = np.zeros(self.size, np.bool_)
        self.counts = np.zeros(self.size)
        self.uncertainties = np.full(self.size, math.inf)

    def run(self, parts: Iterable[Part], policy: Policy) -> Iterator[BatchExitOutput | None]:
        """Run the parts through the stages, and yield each exit's output as it comes.

        Args:
            parts: each is asked for when the one before has gone through the first stage.

        Yields:
            None after every step without an answer; whoever stops asking there calls off the rest.
        """
        stages = [self.chain.stage_of(name) for name in self.exits]
        for index in range(stages[-1] + 1):
            here = [name for name, stage in zip(self.exits, stages, strict=True) if stage == index]
            going: deque[Part] = deque()
            for arrived in parts:
                part = yield from self._through(index, here, arrived, policy)
                if part is not None:
                    going.append(part)
            parts = _taken_from(going)

    def _through(
        self, index: int, here: Sequence[str], arrived: Part, policy: Policy
    ) -> Generator[BatchExitOutput | None, None, Part | None]:
        """Take a part through a stage and to the exits there.

        Returns:
            What is left of it; None of nobody.
        """
        part = arrived if index == 0 else self._select(arrived, policy.keep_for_stage(index, arrived, self))
        if part is None:
            return None
        for batch in part.batches:
            if index == 0:
                batch.state = self.chain.begin(batch.state())
            self._advance(index, batch)
            if index == 0:
                self._add_feature_sums(part, batch)
            yield None
        answered = False
        for name in here:
            if answered:
                part = self._select(part, policy.keep_at_stage(name, part, self))
                if part is None:
                    return None
            if policy.should_run_exit(name, part, self):
                yield self._run_exit(name, part)
                answered = True
        return part

    def needed_ms(
        self, stage: int, exit: str | None, part: Part, *, quantile: float, min_samples: int = 1
    ) -> float | None:
        """What a part takes through a stage and on to an exit's answer; None where a step of it is not known.

        Args:
            exit: None: the stage alone. Of those before it none is asked.
            quantile, min_samples: as of :meth:`Profile.ms`.
        """
        last = stage if exit is None else self.chain.stage_of(exit)
        steps = [*map(stage_step, range(stage, last + 1)), *([] if exit is None else [exit_step(exit)])]
        how: dict[str, Any] = {"quantile": quantile, "min_samples": min_samples}
        total = 0.0
        for batch in part.batches:
            first_ms = batch.first_ms
            if quantile == 0 and first_ms is not None:  # at the very least: this walk's own may have been held up
                first_ms = min(first_ms, self.profile.ms(FIRST, batch.rows, **how) or math.inf)
            ms = self.profile.total_ms(steps, batch.rows, first_ms=first_ms, **how)
            if ms is None:
                return None
            total += ms
        return total

    def _select(self, part: Part, keep: Mask) -> Part | None:
        """The part of some samples only; None of none."""
        if keep.all():
            return part
        if not keep.any():
            return None
        (batch,) = part.batches
        rows = np.repeat(keep, part.views)
        with self.lock:
            state = self.chain.select(batch.state, torch.from_numpy(rows))
        return replace(
            part, samples=part.samples[keep], views=part.views[keep], batches=[Batch(state, int(rows.sum()))]
        )

    def _advance(self, index: int, batch: Batch) -> None:
        batch.state = self._timed(stage_step(index), batch, lambda: self.chain.advance(index, batch.state))

    def _add_feature_sums(self, part: Part, batch: Batch) -> None:
        if self.feature_sums is None or (sums := self.chain.feature_sums(batch.state)) is None:
            return
        # Several batches are all of one sample.
        numbers = np.repeat(part.samples, part.views)[: batch.rows].tolist()
        for number, of_row in zip(numbers, sums, strict=True):
            self.feature_sums[number] = self.feature_sums.get(number, 0) + of_row

    def _run_exit(self, name: str, part: Part) -> BatchExitOutput:
        answers = [self._answer(name, batch) for batch in part.batches]
        starts = np.cumsum([0, *part.views[:-1]])
        values = np.add.reduceat(np.concatenate([answer.value.numpy() for answer in answers]), starts)
        if name in self.earlier:
            values = values + np.float32(self.earlier[name])
        maps = [answer.density[:, 0].numpy() for answer in answers if answer.density is not None]
        output = BatchExitOutput(
            name, part.samples, values, np.split(np.concatenate(maps), starts[1:]) if maps else None
        )
        self.answered[output.samples] = True
        self.counts[output.samples] = np.maximum(values, 0) if values.ndim == 1 else 0
        self.uncertainties[output.samples] = self.uncertainty(output)
        return output

    def _answer(self, name: str, batch: Batch) -> ExitOutput:
        return self._timed(exit_step(name), batch, lambda: self.chain.run_exit(name, batch.state))

    def _timed(self, step: str, batch: Batch, work: Callable[[], T]) -> T:
        with self.lock:
            begun = self.clock()
            out = work()
            took = 1000 * (self.clock() - begun)
        if step == FIRST:
            self.profile.note(step, batch.rows, took)
            batch.first_ms = took
        elif batch.first_ms is not None:
            self.profile.note(step, batch.rows, took, batch.first_ms)
        return out


def _taken_from(parts: deque[Part]) -> Iterator[Part]:
    """Parts one after the other, each let go: what has left is not to wait in memory for the end of the stage."""
    while parts:
        yield parts.popleft()
