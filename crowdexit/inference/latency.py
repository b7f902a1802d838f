"""How long a network takes on this machine: measured, kept up to date, and predicted from that."""

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
        chain: the network, made ready. lock: held during every step.

    Attributes:
        times: of the steps run so far; once :attr:`profile` was asked for, that.
        measured: whether the profile was measured here, rather than read.
    """

    def __init__(self, network: MultiExitNetwork, chain: ReadyChain, collator: Collator, lock: FairLock) -> None:
        self.times = Profile()
        self.measured = False
        self.collator = collator
        self._network, self._chain, self._lock = network, chain, lock

    @cached_property
    def profile(self) -> Profile:
        """How long every stage and exit takes: from the user's cache or, at first and where that does not fit,
        measured now, which takes up to three seconds for each number of rows (one, two, four …), or two runs of these
        where they take longer. From then on every step that is run refreshes it, those of batches excepted that some
        samples have left; it is written when this object goes.
        """
        times = profile_of(self._network, self._chain.runtime)
        stages = map(stage_step, range(len(self._network.stages)))
        if not (times.read() and times.knows([*stages, *map(exit_step, self._network.exit_names), PREPARING, LAYING])):
            self._measure(times)
        weakref.finalize(self, times.write)
        self.times = times
        return times

    def measure_again(self) -> None:
        """Measure the profile anew: the machine may have been busy when that was done."""
        self.profile.forget()
        self._measure(self.profile)

    def _measure(self, times: Profile) -> None:
        """Run an image through everything, with one row, two, four … as far as go through a stage at once."""
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
        """Run an image through everything, as a batch of so many, and note how long each step takes."""
        begun = time.perf_counter()
        _, (row, *_) = prepared(decode_pixels(jpeg), None, self._network.config)
        times.note(PREPARING, 1, 1000 * (time.perf_counter() - begun))
        executor = StageExecutor(self._chain, rows, exits, times, lock=self._lock)
        for _ in executor.run([self.collator.part(0, [[row]] * rows, times)], ANYTIME):
            pass

    def warm_up(self, exits: Sequence[str]) -> None:
        """Run an image of the network's own shape through to exits, for nothing."""
        self._run_through(photo(self._network.config.scene), self.collator.views_in_batch, exits, Profile())

    def measured_ms(self, exit: str) -> float:
        """About when an exit alone answers for an image of the network's own shape, measured now, once."""
        times = Profile()
        self._run_through(photo(self._network.config.scene), self.collator.views_in_batch, [exit], times)
        nominal = self.nominal_ms(exit, times)
        assert nominal is not None
        return nominal

    def nominal_ms(self, exit: str, times: Profile | None = None) -> float | None:
        """What an image of the network's own shape takes until an exit's answer, about; None: not known yet."""
        times = self.times if times is None else times
        preparing, rest = times.ms(PREPARING), times.total_ms(self._steps(exit), self.collator.views)
        return None if preparing is None or rest is None else preparing + rest

    def predicted_s(self, canvases: Sequence[tuple[int, int]], exit: str) -> float | None:
        """How long rows on such canvases will take at least until an exit's answer, in seconds; None: not known.

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
        """All steps of a prepared image up to an exit's answer."""
        return [LAYING, *map(stage_step, range(self._network.stage_of(exit) + 1)), exit_step(exit)]
