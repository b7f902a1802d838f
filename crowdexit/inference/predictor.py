"""Run images through a network stage by stage and convert exit outputs to results."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from crowdexit.calibration.familiarity import Familiarity
from crowdexit.calibration.intervals import Intervals
from crowdexit.data.mel import AudioStatus
from crowdexit.data.scene import ImageInfo
from crowdexit.data.views import canvas_size
from crowdexit.inference.budget import Budget, BudgetTooSmall
from crowdexit.inference.collate import Collator, Prepared, Sample
from crowdexit.inference.deadline import exits_in_time
from crowdexit.inference.errors import CounterError
from crowdexit.inference.executor import BatchExitOutput, Policy, StageExecutor
from crowdexit.inference.fair_lock import FairLock
from crowdexit.inference.latency import Latency
from crowdexit.inference.policies import ANYTIME
from crowdexit.inference.preprocessing import ImageLike
from crowdexit.inference.profile import Profile
from crowdexit.models.network import MultiExitNetwork
from crowdexit.results import CountResult, ExitResult
from crowdexit.runtimes.base import ReadyChain


class Predictor:
    """Runs images through a network on a runtime.

    Args:
        model: the name to report. chain: the network, ready to run.

    Attributes:
        collator: makes batches of images. latency: of every step on this machine.
        intervals: the checkpoint's calibration. familiarity: its statistics of the training images, or None.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        model: str,
        chain: ReadyChain,
        intervals: Intervals,
        familiarity: Familiarity | None,
    ) -> None:
        self.intervals, self.familiarity = intervals, familiarity
        self._network, self._model, self._chain = network, model, chain
        self._lock = FairLock()  # one step at a time on the chain, whoever runs it
        self._ready: set[tuple[str, tuple[int, int]]] = set()
        self.collator = Collator(network.config)
        self.latency = Latency(network, chain, self.collator, self._lock)

    def get_ready(self, exits: Sequence[str], size: tuple[int, int] | None) -> None:
        """Prepare the stages and exits for images of a (width, height), before any timing starts.

        Tiled images and unknown sizes (None) are treated as the network's size.
        """
        config = self._network.config
        canvas = config.size if size is None else canvas_size(*size, config.size, config.view)
        if new := [name for name in exits if (name, canvas) not in self._ready]:
            with self._lock:
                self._chain.prepare(new, canvas if config.view == "scale" else None)
            self._ready.update((name, canvas) for name in new)

    def stream(
        self,
        sample: Sample,
        exits: Sequence[str],
        policy: Policy,
        begun: float,
        deadline: float = math.inf,
        last_moment: float = math.inf,
    ) -> Iterator[ExitResult | None]:
        """Count an image step by step; None after a step without a result.

        Args:
            begun: the time of the request. deadline: of the results.
            last_moment: latest time for the first exit; a tiled image that is predicted to miss it is refused.

        Raises:
            DeadlineMissed: for such an image.
        """
        scene, rows = self.collator.prepare(sample, self.latency.times)
        yield None
        # An extreme shape has too many tiles to be in flight together: results come with the last ones.
        in_flight = self.collator.rows_in_flight
        if len(rows) > self.collator.views and deadline < math.inf:
            exits = exits_in_time(self.latency, rows, exits, begun, deadline, last_moment)
        counts = dict.fromkeys(exits, 0.0)  # of the rows so far
        sums: dict[int, NDArray[np.float64]] = {}
        maps: dict[str, list[NDArray[np.float32]]] = {name: [] for name in exits}
        for start in range(0, len(rows), in_flight):
            last = start + in_flight >= len(rows)
            executor = self._executor(exits, [scene], 1, deadline if last else math.inf, counts, sums)
            part = self.collator.part(0, [rows[start : start + in_flight]], self.latency.times)
            for output in executor.run([part], policy if last else ANYTIME):
                if output is not None:
                    counts[output.exit] = float(output.values[0])
                    maps[output.exit] += [] if output.density is None else list(output.density[0])
                if output is None or not last:
                    yield None
                    continue
                yield self._result(output.exit, counts[output.exit], maps[output.exit], scene, sums.get(0), begun)

    def stream_many(
        self, samples: Iterator[Sample | None], exits: Sequence[str], policy: Policy, in_flight: int
    ) -> Iterator[CountResult | None]:
        """Count samples in order, with so many rows in flight; None yields None.

        Raises:
            BudgetTooSmall: as soon as a budget turns out to be too small.
        """
        begun = time.perf_counter()
        budget = policy if isinstance(policy, Budget) else None
        while True:
            scenes: list[ImageInfo] = []
            order: list[int | None] = []
            if budget is not None:
                budget.window(scenes)
            results: list[list[ExitResult]] = [[] for _ in range(in_flight)]
            executor = self._executor(exits, scenes, in_flight)
            parts = self.collator.parts(samples, self.latency.times, scenes, order, budget, in_flight)
            try:
                for output in executor.run(parts, policy):
                    self._add(output, results, scenes, executor, begun)
            except BudgetTooSmall:  # results so far are not lost
                yield from self._answered(order, results)
                raise
            if budget is not None:
                budget.finish()
            if not order:
                return
            yield from self._answered(order, results)

    def run(self, ready: Prepared, exits: Sequence[str], policy: Policy) -> list[CountResult]:
        """Count prepared images: one result for each, in order."""
        if ready.scenes:
            first = ready.scenes[0]
            self.get_ready(exits, first.size if len(first.rows) == 1 else None)
        begun = time.perf_counter() - ready.seconds
        executor = self._executor(exits[-1:] if policy is ANYTIME else exits, ready.scenes, len(ready.scenes))
        results: list[list[ExitResult]] = [[] for _ in ready.scenes]
        for output in executor.run(ready.copies(), policy):
            self._add(output, results, ready.scenes, executor, begun)
        return [self._of_last(of_one) for of_one in results]

    def feature_sums(self, image: ImageLike) -> NDArray[np.float64] | None:
        """Features for the familiarity of an image, (2C + 1,), from the first stage; None for a network of tokens.

        Raises:
            CrowdExitError: for an unusable image.
        """
        _, rows = self.collator.prepare((image, None), Profile())
        total: NDArray[np.float64] | None = None
        for batch in self.collator.part(0, [rows], self.latency.times).batches:
            with self._lock:
                state = self._chain.advance(0, self._chain.begin(batch.state()))
                sums = self._chain.feature_sums(state)
            if sums is None:
                return None
            total = sums.sum(0) if total is None else total + sums.sum(0)
        return total

    def is_familiar(self, sums: NDArray[np.float64] | None) -> bool | None:
        """Whether an image is familiar, from its feature sums; None if unknown."""
        return None if self.familiarity is None or sums is None else self.familiarity.is_familiar(sums)

    def _executor(
        self,
        exits: Sequence[str],
        scenes: Sequence[ImageInfo],
        size: int,
        deadline: float = math.inf,
        earlier: Mapping[str, float] | None = None,
        feature_sums: dict[int, NDArray[np.float64]] | None = None,
    ) -> StageExecutor:
        """An executor for up to ``size`` samples, described in ``scenes`` by their number.

        Args:
            earlier, feature_sums: as of :class:`StageExecutor`, from an earlier run over other rows of the sample.
        """
        sums: dict[int, NDArray[np.float64]] = {} if feature_sums is None else feature_sums

        def half_widths(output: BatchExitOutput) -> NDArray[np.float64]:
            halves = [
                self.intervals.half_width(
                    output.exit,
                    max(0.0, float(count)),
                    has_audio=scenes[number].has_audio,
                    familiar=self.is_familiar(sums.get(number)),
                )
                for number, count in zip(output.samples.tolist(), output.values, strict=True)
            ]
            return np.array([math.inf if half is None else half for half in halves])

        return StageExecutor(
            self._chain,
            size,
            exits,
            self.latency.times,
            left_ms=lambda: 1000 * (deadline - time.perf_counter()),
            uncertainty=half_widths,
            lock=self._lock,
            earlier={} if earlier is None else earlier,
            feature_sums=None if self.familiarity is None else sums,
        )

    def _answered(
        self, order: Sequence[int | None], results: Sequence[list[ExitResult]]
    ) -> Iterator[CountResult | None]:
        """Results in the order of the samples, up to the first one without any."""
        for number in order:
            if number is not None and not results[number]:
                return
            yield None if number is None else self._of_last(results[number])

    def _of_last(self, results: Sequence[ExitResult]) -> CountResult:
        """Results of one image; the last is the chosen one."""
        return CountResult(self._model, results[-1], tuple(results), warnings=results[-1].warnings)

    def _add(
        self,
        output: BatchExitOutput | None,
        results: Sequence[list[ExitResult]],
        scenes: Sequence[ImageInfo],
        executor: StageExecutor,
        begun: float,
    ) -> None:
        """Add an exit's output, if any, to the results of its samples."""
        if output is None:
            return
        for at, number in enumerate(output.samples.tolist()):
            maps = [] if output.density is None else list(output.density[at])
            sums = (executor.feature_sums or {}).get(number)
            results[number].append(
                self._result(output.exit, float(output.values[at]), maps, scenes[number], sums, begun)
            )

    def _result(
        self,
        name: str,
        count: float,
        maps: Sequence[NDArray[np.float32]],
        scene: ImageInfo,
        sums: NDArray[np.float64] | None,
        begun: float,
    ) -> ExitResult:
        """An exit's result for a scene.

        Args:
            count: raw output of the network. maps: of each row, on its canvas; empty for an exit without maps.
            sums: of its features, or None.
            begun: the time of the request.
        """
        if not math.isfinite(count):
            raise CounterError(f"{self._model}: exit {name} did not return a number")
        # A regressor may predict less than zero.
        count = max(0.0, count)
        familiar = self.is_familiar(sums)
        interval = self.intervals.around(name, count, has_audio=scene.has_audio, familiar=familiar)
        density = scene.density(maps) if maps else None
        audio: AudioStatus = scene.audio if not scene.has_audio or self._network.uses_audio(name) else "switched off"
        latency = 1000 * (time.perf_counter() - begun)
        return ExitResult(name, count, interval, latency, density, scene.warnings, audio, familiar)
