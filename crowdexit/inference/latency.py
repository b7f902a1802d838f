"""Latency of a network on this machine: measured, updated while it runs, and predicted."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby

from crowdexit.data.image import decode_pixels
from crowdexit.inference.collate import Collator
from crowdexit.inference.executor import StageExecutor
from crowdexit.inference.fair_lock import FairLock
from crowdexit.inference.policies import ANYTIME
from crowdexit.inference.preprocessing import photo, prepared
from crowdexit.inference.profile import LAYING, PREPARING, Profile, exit_step, profile_of, stage_step
from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.base import ReadyChain

_TURNS, _PATIENCE_S = 6, 3.0  # of measuring: so often, two at least, for each number of rows, or as long


class Latency:
    """The latencies of a network's steps, and of images of known sizes.

    Args:
        chain: the network, ready to run. lock: held during every step.

    Attributes:
        times: of the steps run so far; the full profile after :attr:`profile` was accessed.
        measured: whether the profile was measured now rather than read from the cache.
    """

    def __init__(self, network: MultiExitNetwork, chain: ReadyChain, collator: Collator, lock: FairLock) -> None:
        self.times = Profile()
        self.measured = False
        self.collator = collator
        self._network, self._chain, self._lock = network, chain, lock

    @cached_property
    def profile(self) -> Profile:
        """The latency of every stage and exit, from the user's cache or, without a matching entry, measured now.

        Measuring takes up to three seconds, or two runs, for each number of rows (one, two, four …). Afterwards every
        step that runs updates it, except for batches from which samples were dropped; it is saved when this object is
        deleted.
        """
        times = profile_of(self._network, self._chain.runtime)
        stages = map(stage_step, range(len(self._network.stages)))
        if not (times.read() and times.knows([*stages, *map(exit_step, self._network.exit_names), PREPARING, LAYING])):
            self._measure(times)
        weakref.finalize(self, times.write)
        self.times = times
        return times

    def measure_again(self) -> None:
        """Measure the profile again, as the machine may have been busy."""
        self.profile.forget()
        self._measure(self.profile)

    def _measure(self, times: Profile) -> None:
        """Measure all steps with one row, two, four … up to the largest batch."""
        self.measured = True
        jpeg = photo(self._network.config.scene)
        rows = 1
        while rows <= self.collator.rows_in_batch:
            long_enough = time.perf_counter() + _PATIENCE_S
            for attempt in range(_TURNS):
                if attempt > 1 and time.perf_counter() > long_enough:
                    break
                kept = times if attempt > 0 else Profile()  # the first warms up
                self._run_through(jpeg, rows, self._network.exit_names, kept)
            rows *= 2
        times.write()

    def _run_through(self, jpeg: bytes, rows: int, exits: Sequence[str], times: Profile) -> None:
        """Run all steps on a batch of so many rows and record their times."""
        begun = time.perf_counter()
        _, (row, *_) = prepared(decode_pixels(jpeg), None, self._network.config)
        times.note(PREPARING, 1, 1000 * (time.perf_counter() - begun))
        executor = StageExecutor(self._chain, rows, exits, times, lock=self._lock)
        for _ in executor.run([self.collator.part(0, [[row]] * rows, times)], ANYTIME):
            pass

    def warm_up(self, exits: Sequence[str]) -> None:
        """Run an image of the network's shape up to some exits and discard the results."""
        self._run_through(photo(self._network.config.scene), self.collator.views_in_batch, exits, Profile())

    def measured_ms(self, exit: str) -> float:
        """Latency up to an exit for an image of the network's shape, measured once, now."""
        times = Profile()
        self._run_through(photo(self._network.config.scene), self.collator.views_in_batch, [exit], times)
        nominal = self.nominal_ms(exit, times)
        assert nominal is not None
        return nominal

    def nominal_ms(self, exit: str, times: Profile | None = None) -> float | None:
        """Expected latency up to an exit for an image of the network's shape; None if not measured yet."""
        times = self.times if times is None else times
        preparing, rest = times.ms(PREPARING), times.total_ms(self._steps(exit), self.collator.views)
        return None if preparing is None or rest is None else preparing + rest

    def predicted_s(self, canvases: Sequence[tuple[int, int]], exit: str) -> float | None:
        """Lower bound of the time for rows on such canvases up to an exit, in seconds; None if unknown.

        Canvases (width, height) smaller than the native size count by their pixels.
        """
        width, height = self._network.config.size
        total = 0.0
        for size, alike in groupby(canvases):
            left = len(list(alike))
            while left > 0:
                together = min(left, self.collator.tiles_in_batch)
                ms: float | None = self.times.total_ms(self._steps(exit), together, quantile=0)
                if ms is None:
                    return None
                total += ms / 1000 * min(1.0, size[0] * size[1] / (width * height))
                left -= together
        return total

    def _steps(self, exit: str) -> list[str]:
        """All steps of a prepared image up to an exit."""
        return [LAYING, *map(stage_step, range(self._network.stage_of(exit) + 1)), exit_step(exit)]
