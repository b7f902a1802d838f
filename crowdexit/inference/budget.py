"""Distribute one time budget over many images so that the expected error is smallest.

An exit's expected error on an image is its mean relative error on held-out images times (count + 10), where count is
the latest estimate (:mod:`crowdexit.calibration.intervals`): dense crowds gain more from deeper exits than empty
streets. Choosing one exit per image, with the smallest total error within a total time, is the multiple-choice knapsack
problem (Sinha and Zoltners 1979; Kellerer, Pferschy and Pisinger 2004, chapter 11). For each image, only the exits on
the lower convex hull of error over time are Pareto options. Along these the error gained per millisecond decreases, so
a greedy allocation, largest gain per millisecond first over all images, is optimal for the time it uses. Time left by
the last step that does not fit goes to smaller steps.

Every image runs the first exit and the Pareto options at the same stage (the first pass). As many images as fit into
memory are planned together; later images are assumed to resemble those seen, and time is reserved for them. The plan is
recomputed before every stage of every part, from the elapsed time and the measured slowdown. Time that the caller
spends between two results counts as elapsed, but not towards the slowdown.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from statistics import median_low
from typing import Protocol

import numpy as np

from crowdexit.calibration.intervals import ROOM
from crowdexit.errors import CrowdExitError
from crowdexit.inference.executor import Mask, Part, StageExecutor

TOLERANCE = 0.05  # of the budget, to either side
_REMEMBERED = 64  # recent images that represent those to come
_PRIOR = 4  # weight of the profile against measurements, in images
_LEAST = 1e-9  # ms; avoids division by zero

Steps = Sequence[tuple[float, float]]


class BudgetError(CrowdExitError):
    """An invalid budget, or a network without calibrated errors."""


class BudgetTooSmall(BudgetError):
    """A budget too small for the first exits."""


@dataclass(frozen=True)
class Costs:
    """The cost of one row, in milliseconds.

    Attributes:
        stages: of each stage.
        exits: of each exit alone, by name.
        stage_of: the index of the stage after which each exit stands.
    """

    stages: Sequence[float]
    exits: Mapping[str, float]
    stage_of: Mapping[str, int]

    def up_to(self, exit: str, after: int = -1) -> float:
        """Cost of the stages after stage ``after`` up to an exit, plus that exit."""
        return sum(self.stages[after + 1 : self.stage_of[exit] + 1]) + self.exits[exit]


def pareto_options(exits: Sequence[str], errors: Mapping[str, float], costs: Costs) -> list[str]:
    """The first exit and the later ones on the lower convex hull of error over time.

    Args:
        exits: in the order of the chain.
        errors: of each; exits without one are skipped.
    """

    def slope(low: str, high: str) -> float:
        return (errors[low] - errors[high]) / max(costs.up_to(high, costs.stage_of[low]), _LEAST)

    pareto = [exits[0]]
    for name in exits[1:]:
        if errors.get(name, np.inf) >= errors[pareto[-1]]:
            continue
        while len(pareto) > 1 and slope(*pareto[-2:]) <= slope(pareto[-1], name):
            pareto.pop()
        pareto.append(name)
    return pareto


def greedy_allocation(
    options: Sequence[Steps], room: float, others: Sequence[Steps] = (), weight: float = 1.0
) -> list[int]:
    """Choose the number of steps per image within a time, greedily by gain per cost.

    Args:
        options: the steps of each image as (cost, gain), with decreasing gain per cost.
        room: total cost allowed.
        others: steps of expected images that compete for the room, each representing ``weight`` images; if not all
            of these fit, as many as do.

    Returns:
        The number of steps for each of ``options``.
    """
    every = [*options, *others]
    taken = [0] * len(every)

    def entry(of: int) -> tuple[float, int]:
        cost, gain = every[of][taken[of]]
        return -gain / max(cost, _LEAST), of

    heap = [entry(of) for of, steps in enumerate(every) if steps]
    heapify(heap)
    while heap:
        _, of = heappop(heap)
        single = of < len(options)
        cost = every[of][taken[of]][0] * (1.0 if single else weight)
        if cost > room:
            room = room if single else 0.0
            continue
        room -= cost
        taken[of] += 1
        if taken[of] < len(every[of]):
            heappush(heap, entry(of))
    return taken[: len(options)]


def check_positive(budget_ms: float | None) -> None:
    """Refuse a budget that is none, before anything is loaded.

    Raises:
        BudgetError: for one that is not positive.
    """
    if budget_ms is not None and not budget_ms > 0:
        raise BudgetError(f"a budget of {budget_ms:g} ms is not positive")


def check_budget(budget_ms: float, first: str, errors: Mapping[str, float]) -> None:
    """Refuse what can be refused before anything is measured.

    Args:
        first: the first exit. errors: of each exit.

    Raises:
        BudgetError: for a budget that is not positive, or a first exit whose errors are not known.
    """
    check_positive(budget_ms)
    if first not in errors:
        raise BudgetError(f"exit {first} is not calibrated; run `crowdexit calibrate`")


class Sample(Protocol):
    """What a budget knows of an image beforehand."""

    @property
    def has_audio(self) -> bool:
        """Whether it has sound."""


@dataclass
class _OnItsWay:
    """An image that has been looked at: the last stage it has gone through, the exit it has its answer from."""

    stage: int
    exit: str
    rows: int


class Budget:
    """The policy of one run over many images; see above. Its time begins when it is made.

    The samples of a part are all heard, or none is.

    Args:
        budget_ms: for all.
        number: of images.
        exits: that may be asked, the first of them of every image.
        errors: of images without (False) and with audio (True), each exit's expected error over (count + 10).
        costs: as the profile has them.
        preparing_ms: what an image takes before the first stage, as the profile has it.
        views: how many rows an image is.
        clock: seconds.

    Raises:
        BudgetTooSmall: if looking at all of them takes longer.
        BudgetError: if the first exit's errors are not known.
    """

    def __init__(
        self,
        budget_ms: float,
        number: int,
        exits: Sequence[str],
        errors: Mapping[bool, Mapping[str, float]],
        costs: Costs,
        preparing_ms: float,
        views: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        for of_state in errors.values():
            check_budget(budget_ms, exits[0], of_state)
        self._budget_ms, self._number, self._first = budget_ms, number, exits[0]
        self._errors, self._costs = errors, costs
        self._options = {has_audio: pareto_options(exits, of_state, costs) for has_audio, of_state in errors.items()}
        first_pass = {
            has_audio: [name for name in pareto if self._in_first_pass(name)]
            for has_audio, pareto in self._options.items()
        }
        self._first_pass_exit = {has_audio: names[-1] for has_audio, names in first_pass.items()}  # the last of them
        further = max(sum(costs.exits[name] for name in names[1:]) for names in first_pass.values())
        self._profiled_ms = preparing_ms + views * (costs.up_to(exits[0]) + further)
        self._check_room(number * self._profiled_ms)
        self._clock, self._mark = clock, clock()
        self._end = self._mark + budget_ms / 1000
        self._first_pass_count, self._first_pass_total_ms = 0, 0.0
        self._first_pass_part_ms = [self._profiled_ms]  # of an image, by part
        self._deep_ms, self._reckoned_ms = 0.0, 0.0  # after the first pass: measured, estimated
        self._running_ms: float | None = None  # estimate of the running step; None: first pass
        self._window: Sequence[Sample] = ()
        self._begun = 0  # images of earlier windows
        self._here: dict[int, _OnItsWay] = {}
        self._recent: deque[tuple[bool, float, int]] = deque(maxlen=_REMEMBERED)  # audio, count + 10, rows
        self._noted = False  # whether this window's images are included

    def window(self, samples: Sequence[Sample]) -> None:
        """Start a new window of images, numbered from zero; the list may still grow."""
        self._mark = self._clock()
        self._running_ms = None
        self._begun += len(self._window)
        self._window, self._here, self._noted = samples, {}, False

    def finish(self) -> None:
        """Record the end of this window."""
        self._spent()

    def skip(self) -> None:
        """Remove one image that cannot be counted."""
        self._number -= 1

    @property
    def used_ms(self) -> float:
        """Budget used up to the last decision."""
        return self._budget_ms - 1000 * (self._end - self._mark)

    @property
    def first_pass_ms(self) -> float:
        """Estimated time of the first pass of one image, including preparation."""
        return (self._first_pass_total_ms + _PRIOR * self._profiled_ms) / (self._first_pass_count + _PRIOR)

    @property
    def slowdown(self) -> float:
        """Measured over estimated time of everything after the first pass."""
        known = _PRIOR * self._profiled_ms
        return (self._deep_ms + known * self.first_pass_ms / self._profiled_ms) / (self._reckoned_ms + known)

    def should_run_exit(self, exit: str, part: Part, executor: StageExecutor) -> bool:
        before = self._first_pass_total_ms
        self._spent()
        if exit == self._first:
            number = len(part.samples)
            self._first_pass_count += number
            self._first_pass_part_ms.append((self._first_pass_total_ms - before) / number)
            self._check_time()
            for sample, rows in zip(part.samples.tolist(), part.views.tolist(), strict=True):
                self._here[sample] = _OnItsWay(self._costs.stage_of[exit], exit, rows)
            return True
        if not self._is_option(exit, part):
            return False
        for sample in part.samples.tolist():
            self._here[sample].exit = exit
        if not self._in_first_pass(exit):
            self._running_ms = float(part.views.sum()) * self._costs.exits[exit]
        return True

    def keep_at_stage(self, exit: str, part: Part, executor: StageExecutor) -> Mask:
        if self._in_first_pass(exit) or not self._is_option(exit, part):
            return np.ones(len(part.samples), np.bool_)
        return self._going_deeper(part, executor)

    def keep_for_stage(self, stage: int, part: Part, executor: StageExecutor) -> Mask:
        if not executor.answered[part.samples].all():
            return np.ones(len(part.samples), np.bool_)
        keep = self._going_deeper(part, executor)
        for sample in part.samples[keep].tolist():
            self._here[sample].stage = stage
        self._running_ms = float(part.views[keep].sum()) * self._costs.stages[stage]
        return keep

    def _in_first_pass(self, exit: str) -> bool:
        """Whether an exit is at the stage of the first exit, which every image reaches."""
        return self._costs.stage_of[exit] == self._costs.stage_of[self._first]

    def _is_option(self, exit: str, part: Part) -> bool:
        return exit in self._options[self._window[part.samples[0]].has_audio]

    def _going_deeper(self, part: Part, executor: StageExecutor) -> Mask:
        """Mask of a part's samples that go deeper by the current plan; the others are removed."""
        self._spent()
        steps = self._plan(executor)
        keep: Mask = np.array([steps[sample] > 0 for sample in part.samples.tolist()])
        for sample in part.samples[~keep].tolist():
            del self._here[sample]
        return keep

    def _check_room(self, first_pass_total_ms: float) -> None:
        if first_pass_total_ms > (1 + TOLERANCE) * self._budget_ms:
            raise BudgetTooSmall(
                f"a budget of {self._budget_ms:g} ms is too small for {self._number} images: "
                f"their first exits alone take about {first_pass_total_ms:.0f} ms"
            )

    def _check_time(self) -> None:
        """Raise if the first pass of the remaining images no longer fits.

        Each is estimated by the median over parts or by the mean, whichever is less, so that neither one slow step
        nor a few large images end the run.
        """
        to_come = max(0, self._number - self._begun - len(self._window))
        if to_come > 0:
            self._check_room(self.used_ms + to_come * min(self.first_pass_ms, median_low(self._first_pass_part_ms)))

    def _spent(self) -> None:
        """Attribute the time since the last decision to the first pass or to deeper stages."""
        now = self._clock()
        spent = 1000 * (now - self._mark)
        self._mark = now
        if self._running_ms is None:
            self._first_pass_total_ms += spent
        else:
            self._deep_ms += spent
            self._reckoned_ms += self._running_ms
            self._running_ms = 0.0

    def _plan(self, executor: StageExecutor) -> dict[int, int]:
        """The number of further steps for each running image."""
        slowdown = self.slowdown
        to_come = max(0, self._number - self._first_pass_count)
        room = 1000 * (self._end - self._mark) - to_come * self.first_pass_ms

        def steps(at: _OnItsWay, has_audio: bool, scale: float) -> Steps:
            pareto, errors = self._options[has_audio], self._errors[has_audio]
            stage, exit, out = at.stage, at.exit, []
            for higher in pareto[pareto.index(exit) + 1 :]:
                cost = slowdown * at.rows * self._costs.up_to(higher, stage)
                out.append((cost, scale * (errors[exit] - errors[higher])))
                stage, exit = self._costs.stage_of[higher], higher
            return out

        has_audio = {sample: self._window[sample].has_audio for sample in self._here}
        scale = {sample: float(executor.counts[sample]) + ROOM for sample in self._here}
        if not self._noted:
            self._recent += [(has_audio[sample], scale[sample], at.rows) for sample, at in self._here.items()]
            self._noted = True
        options = [steps(at, has_audio[sample], scale[sample]) for sample, at in self._here.items()]
        first_stage = self._costs.stage_of[self._first]
        others = [
            steps(_OnItsWay(first_stage, self._first_pass_exit[has_audio_], rows), has_audio_, scale_)
            for has_audio_, scale_, rows in self._recent
        ]
        return dict(zip(self._here, greedy_allocation(options, room, others, to_come / len(others)), strict=True))
