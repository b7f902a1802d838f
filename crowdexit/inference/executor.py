"""Run samples through a network stage by stage, dropping those that have exited.

A *sample* is an image to count or classify; it is one row of the batch, or several if it is tiled. A *part* is a group
of samples that run a stage together. All parts finish a stage before any starts the next, so that early results come
early for all samples and each exit decision uses the latest information.
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
    """Rows of the network's batch between two stages.

    Attributes:
        state: output of the last stage; before the first, a function that makes the input features.
        rows: number of rows.
        first_ms: time of the first stage; None before it, and after rows were dropped.
    """

    state: Any
    rows: int
    first_ms: float | None = None


@dataclass(frozen=True)
class Part:
    """Samples that run a stage together.

    Attributes:
        samples: their numbers (n,).
        views: number of rows of each (n,).
        batches: their rows in order; more than one batch only for a single sample with many rows.
    """

    samples: NDArray[np.intp]
    views: NDArray[np.intp]
    batches: list[Batch]


@dataclass(frozen=True)
class BatchExitOutput:
    """Output of an exit for a part's samples.

    Attributes:
        exit: its name.
        samples: their numbers (n,).
        values: counts (n,), or class scores (n, K); the sum over the rows of a sample.
        density: for each sample the maps of its rows (rows, h, w); None if the exit has none.
    """

    exit: str
    samples: NDArray[np.intp]
    values: NDArray[np.float32]
    density: list[NDArray[np.float32]] | None


class Policy(Protocol):
    """Decides which exits run and which samples continue."""

    def should_run_exit(self, exit: str, part: Part, executor: StageExecutor) -> bool:
        """Whether to run an exit on a part that has reached it."""

    def keep_at_stage(self, exit: str, part: Part, executor: StageExecutor) -> Mask:
        """Mask (n,) of a part's samples that continue to the next exit of the same stage."""

    def keep_for_stage(self, stage: int, part: Part, executor: StageExecutor) -> Mask:
        """Mask (n,) of a part's samples that run a stage; the others exit. Not called for the first stage."""


@dataclass
class StageExecutor:
    """Runs numbered samples through a chain; a policy sees its state.

    Attributes:
        chain: the network, ready to run.
        size: maximum number of samples.
        exits: names of exits that may run, in the order of the chain.
        profile: latency of steps; every step without dropped rows is recorded.
        left_ms: time until the deadline; negative after it.
        uncertainty: of an exit's outputs (n,), in the unit that the policy compares; default: inf (unknown).
        lock: held during every step, so that only one thread at a time runs the chain.
        earlier: each exit's sum over rows of the sample that ran before; it is added.
        feature_sums: by sample number, the sums of its rows' features after the first stage
            (:meth:`ReadyChain.feature_sums`); None: not computed.
        clock: seconds.
        answered: which samples have a result (size,).
        counts: their latest counts (size,); zero for classes.
        uncertainties: of their latest results (size,); inf without one.
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
        """Run the parts through the stages and yield each exit's output.

        Args:
            parts: the next one is taken when the one before has run the first stage.

        Yields:
            None after every step without output; a caller may stop there, and the rest is not computed.
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
        """Run a part through a stage and the exits at it.

        Returns:
            The samples that continue; None if there are none.
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
        """Expected time of a part from a stage to an exit's output; None if a step was not measured.

        Args:
            exit: None: the stage alone. Earlier exits are not included.
            quantile, min_samples: as of :meth:`Profile.ms`.
        """
        last = stage if exit is None else self.chain.stage_of(exit)
        steps = [*map(stage_step, range(stage, last + 1)), *([] if exit is None else [exit_step(exit)])]
        how: dict[str, Any] = {"quantile": quantile, "min_samples": min_samples}
        total = 0.0
        for batch in part.batches:
            first_ms = batch.first_ms
            if quantile == 0 and first_ms is not None:  # a lower bound: this run may have been delayed
                first_ms = min(first_ms, self.profile.ms(FIRST, batch.rows, **how) or math.inf)
            ms = self.profile.total_ms(steps, batch.rows, first_ms=first_ms, **how)
            if ms is None:
                return None
            total += ms
        return total

    def _select(self, part: Part, keep: Mask) -> Part | None:
        """The selected samples of a part; None if there are none."""
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
        # Several batches belong to one sample.
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
    """Yield parts and release each, so that samples that have exited do not stay in memory."""
    while parts:
        yield parts.popleft()
