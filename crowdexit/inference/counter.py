"""The one door for callers: an image and perhaps a sound go in, counts come out as the exits answer."""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdexit.calibration.familiarity import Familiarity
from crowdexit.calibration.intervals import Intervals
from crowdexit.data.image import DecodedImage, ImageError, decode_pixels, read_header
from crowdexit.data.mel import AudioStatus
from crowdexit.data.views import (
    PIXELS_ABREAST,
    PIXELS_AT_ONCE,
    PIXELS_OF_TILES_AT_ONCE,
    canvas_size,
    same_size_groups,
    scaled_size,
    tile_boxes,
    views,
)
from crowdexit.errors import CrowdExitError
from crowdexit.inference.anytime import DeadlineMissed, answers_by
from crowdexit.inference.budget import TOLERANCE, Budget, BudgetTooSmall, Costs, check_budget
from crowdexit.inference.executor import Batch, BatchExitOutput, Part, Policy, StageExecutor
from crowdexit.inference.fair_lock import FairLock
from crowdexit.inference.models import calibration_of, open_model
from crowdexit.inference.policies import ANYTIME, Confident, DeepestThatFits
from crowdexit.inference.preprocessing import AudioLike, Box, ImageLike, Row, Scene, photo, prepared
from crowdexit.inference.profile import LAYING, PREPARING, Profile, exit_step, profile_of, stage_step
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.models.stages import Features
from crowdexit.runtimes.base import Runtime
from crowdexit.runtimes.batch import batch_of
from crowdexit.runtimes.selection import select_runtime
from crowdexit.utils.memory import keep_freed_memory
from crowdexit.utils.paths import is_file

log = logging.getLogger(__name__)

Late = Literal["wait", "fail"]

# With late="wait", how many times the deadline the first answer may be foreseen to take before the image is refused.
MOST_LATE = 10
_TURNS, _PATIENCE_S = 6, 3.0  # of measuring: so often, two at least, for each number of rows, or as long


class CounterError(CrowdExitError):
    """A request that this counter cannot serve."""


@dataclass(frozen=True)
class ExitResult:
    """What one exit says.

    Attributes:
        exit: its name.
        count: people.
        interval: (low, high), or None where the checkpoint is not calibrated.
        latency_ms: from the request to this answer, preparing the image included.
        density: (h, w) heads per cell of 8×8 network pixels over the image without padding; None from exits that
            make none.
        warnings: what the reader of the input had to say, e.g. of damage; the same of every exit.
        audio: whether this exit was given audio, or why not: ``none`` was there, it was ``unreadable``, the image is
            ``tiled`` (audio belongs to all of it), or it is ``switched off`` (also where this exit uses none).
        familiar: whether the image is like those that the network was trained on; False: the count may be far off.
            None: the checkpoint has no statistics of them. The same of every exit.
    """

    exit: str
    count: float
    interval: tuple[float, float] | None
    latency_ms: float
    density: NDArray[np.float32] | None = None
    warnings: tuple[str, ...] = ()
    audio: AudioStatus = "none"
    familiar: bool | None = None


@dataclass(frozen=True)
class CountResult:
    """All answers to one request, the one that was chosen, and what the reader of the input had to say."""

    model: str
    chosen: ExitResult
    exits: tuple[ExitResult, ...]
    in_time: bool | None = None  # whether the chosen answer came by the deadline; None: there was none
    warnings: tuple[str, ...] = ()  # one line each; a count with a warning may be wrong

    @property
    def count(self) -> float:
        return self.chosen.count

    @property
    def audio(self) -> AudioStatus:
        """Whether the chosen exit was given audio, or why not: see :class:`ExitResult`."""
        return self.chosen.audio

    @property
    def familiar(self) -> bool | None:
        """Whether the image is like those that the network was trained on: see :class:`ExitResult`."""
        return self.chosen.familiar

    def to_dict(self, source: str) -> dict[str, Any]:
        """The JSON form; with a deadline also ``in_time``."""
        return {
            "source": source,
            "model": self.model,
            "count": round(self.count, 2),
            "chosen_exit": self.chosen.exit,
            "latency_ms": round(self.chosen.latency_ms, 2),
            "exits": [
                {
                    "exit": e.exit,
                    "count": round(e.count, 2),
                    "interval": None if e.interval is None else [round(bound, 2) for bound in e.interval],
                    "latency_ms": round(e.latency_ms, 2),
                }
                for e in self.exits
            ],
            "audio": self.audio,
            "familiar": self.familiar,
            "warnings": list(self.warnings),
            **({} if self.in_time is None else {"in_time": self.in_time}),
        }


@dataclass(frozen=True)
class Prepared:
    """Images and sounds as the network takes them: what :meth:`CrowdCounter.prepare` makes.

    Attributes:
        scenes: of each image. parts: their rows, laid out.
        seconds: that it took to make.
    """

    scenes: Sequence[Scene]
    parts: Sequence[Part]
    seconds: float

    def copies(self) -> list[Part]:
        """The parts for one walk, which leaves these as they are."""
        return [replace(part, batches=[replace(batch) for batch in part.batches]) for part in self.parts]


class CrowdCounter:
    """Counts people with one network on one runtime.

    Args:
        network: with its weights.
        model: the name to report.
        runtime: how stages and exits are run.
        exits: names to serve; default: one a place, and the final exit (:func:`served_exits`).
        intervals: the checkpoint's calibration.
        familiarity: its statistics of the training images, or None.
        warm: get ready for images of the network's own size now; else, as for other sizes, at the first image.

    Raises:
        CounterError: for an exit that the network does not have.
    """

    def __init__(
        self,
        network: MultiExitNetwork,
        model: str,
        *,
        runtime: Runtime | None = None,
        exits: Sequence[str] | None = None,
        intervals: Intervals | None = None,
        familiarity: Familiarity | None = None,
        warm: bool = True,
    ) -> None:
        if network.classifies:
            raise CounterError(f"{model} tells classes apart; it does not count")
        self.network = network
        self.model = model
        self.exits = served_exits(network) if exits is None else self._known(exits)
        self.intervals = intervals or Intervals()
        self.familiarity = familiarity
        self.chain = (runtime or select_runtime("auto")).ready(network)
        self._prepared: set[tuple[str, tuple[int, int]]] = set()
        self._lock = FairLock()
        if warm:
            self._prepare(self.exits, None)
        self._times = Profile()
        self._measured = False  # the profile, by this counter

    def _known(self, exits: Sequence[str]) -> list[str]:
        if not exits:
            raise CounterError("no exit is asked")
        for name in exits:
            if name not in self.network.exit_names:
                raise CounterError(f"no exit {name!r} in {self.model} (it has {', '.join(self.network.exit_names)})")
        return [name for name in self.network.exit_names if name in exits]

    def _asked(self, exits: Sequence[str] | None) -> list[str]:
        """Exits that are going to be asked: all that are served by default."""
        return self.exits if exits is None else self._known(exits)

    def _prepare(self, exits: Sequence[str], size: tuple[int, int] | None) -> None:
        """Get the way to exits ready for images of a (width, height), before any clock runs.

        What is cut into tiles, or whose size is not known (None), counts as one of the network's own size.
        """
        config = self.network.config
        canvas = config.size if size is None else canvas_size(*size, config.size, config.view)
        if new := [name for name in exits if (name, canvas) not in self._prepared]:
            with self._lock:
                self.chain.prepare(new, canvas if config.view == "scale" else None)
            self._prepared.update((name, canvas) for name in new)

    def _up_to(self, exit: str) -> list[str]:
        """The exits that are asked on the way to one, and that one; ``auto`` is the last that this counter serves."""
        last = self.exits[-1] if exit == "auto" else self._known([exit])[0]
        names = self.network.exit_names
        return self._asked([*(name for name in names[: names.index(last)] if name in self.exits), last])

    @property
    def size(self) -> tuple[int, int]:
        """The (width, height) at which an image is looked at."""
        return self.network.config.scene

    def stream(
        self, image: ImageLike, audio: AudioLike | None = None, *, exits: Sequence[str] | None = None
    ) -> Iterator[ExitResult]:
        """Yield each exit's answer as soon as it is there; what the caller no longer asks for is not computed.

        Args:
            image: H×W×3 uint8 RGB or H×W grey, a Pillow image, or a file; a
                :class:`crowdexit.data.image.DecodedImage` brings its warnings.
            audio: a file, (waveform, sample rate) or (sample rate, waveform with its channels last, as
                ``scipy.io.wavfile`` and Gradio give it), a log-mel (96, 64), or None: no audio; an
                :class:`crowdexit.data.mel.AudioInput` says why there is none, or brings warnings.
            exits: names; default: all that this counter serves.

        An image more than four times the native size is cut into tiles, which are added; the audio belongs
        to the whole scene and is then not used.

        Raises:
            CrowdExitError: for an image or a sound that cannot be used.

        Examples:
            >>> import crowdexit
            >>> counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
            >>> for result in counter.stream("street.jpg", "street-simulated.wav"):
            ...     print(f"{result.exit} {result.count:.1f}")
            V0 11.3
            V1 9.0
            AV1 9.0
            AV2 9.6
            final 9.5
        """
        wanted = self._asked(exits)
        self._prepare(wanted, self._size_of(image))
        for result in self._steps(image, audio, wanted, ANYTIME, time.perf_counter()):
            if result is not None:
                yield result

    def count(
        self,
        image: ImageLike,
        audio: AudioLike | None = None,
        *,
        exit: str = "auto",
        deadline_ms: float | None = None,
        late: Late = "wait",
        policy: Policy = ANYTIME,
    ) -> CountResult:
        """Count with the exits up to ``exit``, and choose the last answer.

        Args:
            image: as of :meth:`stream`.
            audio: as of :meth:`stream`.
            exit: the last exit to run; ``auto`` is the last that this counter serves.
            deadline_ms: when to return, from this call on, with the latest answer that is there by then, even in
                the middle of a stage. Preparing the image counts, and so does the end of the layer (with
                torch.compile, of the stage), or of the decoding, that an earlier request, to whichever counter of this
                process, has left running. An error that comes after an answer is reported as a warning.
            late: what to do where not even the first exit has answered by then: ``wait`` for it, or ``fail``. An image
                that is cut into tiles is refused before it is computed where its first exit is foreseen to be late
                (``fail``), or later than ten times the deadline (``wait``).
            policy: which exits are asked, and when one of them will do (:mod:`crowdexit.inference.policies`). For
                ``DeepestThatFits`` the machine is measured once, before the time begins.

        Raises:
            DeadlineMissed: if no exit has answered, and ``late`` is ``fail``; or of a tiled image, if that is foreseen.
            CrowdExitError: as :meth:`stream`; for a deadline that is not positive, or a policy that has nothing to
                go by.

        Examples:
            >>> import crowdexit
            >>> counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
            >>> result = counter.count("street.jpg", exit="V1")
            >>> f"{result.count:.1f}"
            '9.0'
            >>> low, high = result.chosen.interval
            >>> f"{low:.1f} to {high:.1f}"
            '5.8 to 12.2'
            >>> counter.count("street.jpg", deadline_ms=60_000).in_time
            True
        """
        check_deadline(deadline_ms)
        size = self._size_of(image)
        boxes = self._tiles_of(size)
        tiled = len(boxes) > 1
        if late not in get_args(Late):
            raise CounterError(f"late is one of {', '.join(get_args(Late))}, not {late!r}")
        most_ms = math.inf if deadline_ms is None else deadline_ms * (1 if late == "fail" else MOST_LATE)
        if deadline_ms is None:
            self._check_without_deadline(policy)
        else:
            self.make_ready_for(policy)
        wanted = self._up_to(exit)
        last = wanted[-1]
        if deadline_ms is not None and tiled:
            _ = self.profile  # by which it is foreseen when the exits will answer
            self._check_in_time(wanted[0], boxes, deadline_ms, most_ms)
        self._prepare(wanted, None if tiled else size)
        begun = time.perf_counter()
        if deadline_ms is None:
            results = list(filter(None, self._steps(image, audio, wanted, policy, begun)))
        else:
            deadline = begun + deadline_ms / 1000
            steps = self._steps(image, audio, wanted, policy, begun, deadline, begun + most_ms / 1000)
            come = answers_by(deadline, steps, wait=late == "wait")
            results = [result for result in come if result.latency_ms <= deadline_ms]
            if not results and late == "wait":
                results = come[:1]
        if not results:
            usual = self._usual_ms(wanted[0])
            note = "" if usual is None else f" (the first, {wanted[0]}, takes about {usual:.0f} ms here)"
            note = "; the image is cut into tiles" if tiled else note
            raise DeadlineMissed(f"no exit answered within {deadline_ms:g} ms{note}")
        chosen = next((r for r in results if r.exit == last), results[-1])
        in_time = None if deadline_ms is None else chosen.latency_ms <= deadline_ms
        return CountResult(self.model, chosen, tuple(results), in_time, chosen.warnings)

    def count_many(
        self,
        samples: Iterable[tuple[ImageLike, AudioLike | None] | None],
        *,
        exits: Sequence[str] | None = None,
        policy: Policy = ANYTIME,
        budget_ms: float | None = None,
        number: int | None = None,
    ) -> Iterator[CountResult | None]:
        """Count many images, several in a batch; what is counted does not depend on which.

        Args:
            samples: images with their sounds, as of :meth:`stream`, taken as they are needed; in the place of None
                stands None in the results.
            exits: names; default: all that this counter serves.
            policy: by which each of them leaves.
            budget_ms: the time for all of them, from the first result asked for, and with what the caller does between
                two results: who leaves where is chosen so that the expected error is least
                (:mod:`crowdexit.inference.budget`). What is left over when everything has been computed is not burnt.
                The machine is measured once, before the time begins.
            number: how many samples there are, for a budget; default: their length.

        Yields:
            Results in the order of the samples; the chosen answer is the last. Latencies count from the first result
            asked for.

        Raises:
            BudgetError: for a budget that is not positive, or a network that is not calibrated.
            BudgetTooSmall: if the first exits alone take longer than the budget: when the first result is asked for,
                as far as the profile tells, and with any later one, as soon as the time shows it.
            CrowdExitError: as :meth:`stream`; for a policy that has nothing to go by.

        Examples:
            >>> import crowdexit
            >>> counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
            >>> results = counter.count_many([("street.jpg", None), ("crowd.jpg", None)])
            >>> [result.chosen.exit for result in results]
            ['final', 'final']
        """
        wanted = self._asked(exits)
        self._prepare(wanted, None)
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            raise CounterError("many images together have no deadline that an exit could fit; give a budget")
        if budget_ms is None:
            return self._many(iter(samples), wanted, policy, self._rows(PIXELS_AT_ONCE))
        if policy is not ANYTIME:
            raise CounterError("a budget is a policy itself")
        check_budget(budget_ms, wanted[0], self.intervals.errors(has_audio=False))
        if number is None:
            if not isinstance(samples, Sized):
                raise CounterError("a budget has to know the number of images")
            number = len(samples)
        return self._within(budget_ms, number, iter(samples), wanted)

    def size_for(self, width: int, height: int) -> tuple[int, int] | None:
        """The (width, height) to which an image of that size may be scaled down before it is handed over.

        That spares the work of converting what would not be looked at. None: it will be cut into tiles.
        """
        config = self.network.config
        if len(tile_boxes(width, height, config.scene)) > 1:
            return None
        if config.view == "tiles":
            return width, height
        if config.view == "scale":
            return scaled_size(width, height, config.size)
        scale = min(1.0, config.size[0] / width, config.size[1] / height)
        return max(1, round(width * scale)), max(1, round(height * scale))

    def prepare(self, samples: Iterable[tuple[ImageLike, AudioLike | None]]) -> Prepared:
        """Make images with their sounds, as of :meth:`stream`, ready for the network: all but the counting.

        It may be done in another thread while this counter counts others. All of them are in memory at once.

        Raises:
            CrowdExitError: for an image or a sound that cannot be used.
        """
        begun = time.perf_counter()
        scenes: list[Scene] = []
        parts = list(self._parts(samples, scenes, [], None))
        for batch in (batch for part in parts for batch in part.batches):
            batch.state = partial(_itself, batch.state())
        return Prepared(scenes, parts, time.perf_counter() - begun)

    def answers(self, ready: Prepared, *, exit: str = "auto", policy: Policy = ANYTIME) -> list[CountResult]:
        """Count what :meth:`prepare` has made, as often as you like: one result for each image, in their order.

        Args:
            exit: as of :meth:`count`; nobody else is asked, unless the policy may have an image leave earlier.
            policy: by which each of them leaves.

        The latency of an answer is that of the whole batch until then, preparing it included.

        Raises:
            CrowdExitError: for an exit that there is not, or a policy that has nothing to go by.
        """
        self._check_without_deadline(policy)
        wanted = self._up_to(exit)
        if ready.scenes:
            first = ready.scenes[0]
            self._prepare(wanted, first.size if len(first.rows) == 1 else None)
        begun = time.perf_counter() - ready.seconds
        executor = self._executor(wanted[-1:] if policy is ANYTIME else wanted, ready.scenes, len(ready.scenes))
        results: list[list[ExitResult]] = [[] for _ in ready.scenes]
        for output in executor.run(ready.copies(), policy):
            self._write_down(output, results, ready.scenes, executor, begun)
        return [self._last_chosen(of_one) for of_one in results]

    def feature_sums(self, image: ImageLike) -> NDArray[np.float64] | None:
        """What tells how familiar an image is, (2C + 1,), by the first stage alone; None of a network of tokens.

        Raises:
            CrowdExitError: for an image that cannot be used.
        """
        _, rows = prepared(image, None, self.network.config)
        total: NDArray[np.float64] | None = None
        for batch in self._part(0, [rows], self._times).batches:
            with self._lock:
                state = self.chain.advance(0, self.chain.begin(batch.state()))
                sums = self.chain.feature_sums(state)
            if sums is None:
                return None
            total = sums.sum(0) if total is None else total + sums.sum(0)
        return total

    @cached_property
    def profile(self) -> Profile:
        """How long every stage and exit takes: from the user's cache or, at first and where that does not fit,
        measured now, which takes up to three seconds for each number of rows (one, two, four …), or two runs of these
        where they take longer. From then on every step that this counter runs refreshes it, those of batches excepted
        that some have left; it is kept when the counter goes.
        """
        times = profile_of(self.network, self.chain.runtime)
        exits = self.network.exit_names
        steps = [*map(stage_step, range(len(self.network.stages))), *map(exit_step, exits), PREPARING, LAYING]
        if not (times.read() and times.knows(steps)):
            self._measure(times)
        weakref.finalize(self, times.write)
        self._times = times
        return times

    def _measure(self, times: Profile) -> None:
        """Run an image through everything, with one row, two, four … as far as go through a stage at once."""
        self._measured = True
        jpeg = photo(self.size)
        rows = 1
        while rows <= self._rows(PIXELS_AT_ONCE):
            long_enough = time.perf_counter() + _PATIENCE_S
            for attempt in range(_TURNS):
                if attempt > 1 and time.perf_counter() > long_enough:
                    break
                kept = times if attempt > 0 else Profile()  # the first warms up
                self._run_through(jpeg, rows, self.network.exit_names, kept)
            rows *= 2
        times.write()

    def _run_through(self, jpeg: bytes, rows: int, exits: Sequence[str], times: Profile) -> None:
        """Run an image through everything, as a batch of so many, and note how long each step takes."""
        begun = time.perf_counter()
        _, (row, *_) = prepared(decode_pixels(jpeg), None, self.network.config)
        times.note(PREPARING, 1, 1000 * (time.perf_counter() - begun))
        executor = StageExecutor(self.chain, rows, exits, times, lock=self._lock)
        for _ in executor.run([self._part(0, [[row]] * rows, times)], ANYTIME):
            pass

    def warm_up(self, exit: str = "auto") -> None:
        """Run up to an exit for nothing: the first image after loading takes longer than those that come after it.

        Args:
            exit: as of :meth:`count`.
        """
        self._run_through(photo(self.size), self._views_at_once, self._up_to(exit), Profile())

    def first_answer(self, exit: str = "auto") -> tuple[str, float]:
        """The first exit on the way to one, and about when it answers here for an image of :attr:`size`, in ms.

        It is measured now, once, after :meth:`warm_up`; a longer look is the :attr:`profile`.

        Args:
            exit: as of :meth:`count`.
        """
        first, times = self._up_to(exit)[0], Profile()
        self._run_through(photo(self.size), self._views_at_once, [first], times)
        usual = self._usual_ms(first, times)
        assert usual is not None
        return first, usual

    def _usual_ms(self, exit: str, times: Profile | None = None) -> float | None:
        """What an image of the scene's shape takes here until an exit's answer, about; None: not known yet."""
        times = self._times if times is None else times
        preparing = times.ms(PREPARING)
        steps = [LAYING, *map(stage_step, range(self.network.stage_of(exit) + 1)), exit_step(exit)]
        rest = times.total_ms(steps, self._views)
        return None if preparing is None or rest is None else preparing + rest

    def _rows(self, pixels: int) -> int:
        """How many rows of a batch have so many pixels; one at least."""
        width, height = self.network.config.size
        return max(1, pixels // (width * height))

    @property
    def _views_at_once(self) -> int:
        """Those of them that go through a stage together."""
        return min(self._views, self._rows(PIXELS_AT_ONCE))

    @property
    def _tiles_at_once(self) -> int:
        """How many rows of a tiled image go through a stage together; all of an image that is not tiled."""
        return max(self._views_at_once, self._rows(min(PIXELS_AT_ONCE, PIXELS_OF_TILES_AT_ONCE)))

    @cached_property
    def _views(self) -> int:
        """How many rows an image of the scene's shape takes."""
        width, height = self.size
        config = self.network.config
        return len(views(np.zeros((height, width, 3), np.uint8), config.size, config.view))

    def make_ready_for(self, policy: Policy) -> None:
        """Do what a policy with a deadline needs before any time begins: ``DeepestThatFits`` goes by the profile.

        Raises:
            CounterError: for a policy that has nothing to go by.
        """
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            _ = self.profile

    def _check(self, policy: Policy) -> None:
        if isinstance(policy, Confident) and not self.intervals.without_audio:
            raise CounterError(f"{self.model} has no intervals to be confident by: see crowdexit calibrate")

    def _check_without_deadline(self, policy: Policy) -> None:
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            raise CounterError("which exit is the deepest that fits, only a deadline can tell")

    def _part(self, first: int, samples: Sequence[Sequence[Row]], times: Profile) -> Part:
        """Samples numbered from ``first`` on, by their rows; in several batches a single one alone.

        Rows of several samples are on canvases of one size.
        """
        rows = [row for of_one in samples for row in of_one]
        at_once = self._tiles_at_once if len(samples) == 1 else self._rows(PIXELS_AT_ONCE)
        batches = [Batch(partial(_laid_out, some, times), len(some)) for some in same_size_groups(rows, at_once)]
        return Part(np.arange(first, first + len(samples)), np.array([len(of_one) for of_one in samples]), batches)

    def _executor(
        self,
        exits: Sequence[str],
        scenes: Sequence[Scene],
        size: int,
        deadline: float = math.inf,
        earlier: Mapping[str, float] | None = None,
        feature_sums: dict[int, NDArray[np.float64]] | None = None,
    ) -> StageExecutor:
        """A walk of up to ``size`` samples, of which ``scenes`` tells by their number.

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
                    familiar=self._is_familiar(sums.get(number)),
                )
                for number, count in zip(output.samples.tolist(), output.values, strict=True)
            ]
            return np.array([math.inf if half is None else half for half in halves])

        def left_ms() -> float:
            return 1000 * (deadline - time.perf_counter())

        earlier = {} if earlier is None else earlier
        wanted = None if self.familiarity is None else sums
        return StageExecutor(self.chain, size, exits, self._times, left_ms, half_widths, self._lock, earlier, wanted)

    def _is_familiar(self, sums: NDArray[np.float64] | None) -> bool | None:
        """Whether an image is familiar, from its features' sums; None where that is not known."""
        return None if self.familiarity is None or sums is None else self.familiarity.is_familiar(sums)

    def _steps(
        self,
        image: ImageLike,
        audio: AudioLike | None,
        exits: Sequence[str],
        policy: Policy,
        begun: float,
        deadline: float = math.inf,
        last_moment: float = math.inf,
    ) -> Iterator[ExitResult | None]:
        """Count an image step by step; None after a step without an answer.

        Args:
            last_moment: when the first exit has to answer at the latest; a tiled image of which it is foreseen to be
                later is refused.

        Raises:
            DeadlineMissed: for such an image.
        """
        preparing = time.perf_counter()
        scene, rows = prepared(image, audio, self.network.config)
        self._times.note(PREPARING, 1, 1000 * (time.perf_counter() - preparing))
        yield None
        # An image of an absurd shape has too many tiles to go through the network abreast: the last of them tell.
        abreast = self._rows(PIXELS_ABREAST)
        if len(rows) > self._views and deadline < math.inf:
            exits = self._exits_in_time(rows, exits, begun, deadline, last_moment)
        counts = dict.fromkeys(exits, 0.0)  # of the rows so far
        sums: dict[int, NDArray[np.float64]] = {}
        maps: dict[str, list[NDArray[np.float32]]] = {name: [] for name in exits}
        for start in range(0, len(rows), abreast):
            last = start + abreast >= len(rows)
            executor = self._executor(exits, [scene], 1, deadline if last else math.inf, counts, sums)
            part = self._part(0, [rows[start : start + abreast]], self._times)
            for output in executor.run([part], policy if last else ANYTIME):
                if output is not None:
                    counts[output.exit] = float(output.values[0])
                    maps[output.exit] += [] if output.density is None else list(output.density[0])
                if output is None or not last:
                    yield None
                    continue
                yield self._result(output.exit, counts[output.exit], maps[output.exit], scene, sums.get(0), begun)

    @staticmethod
    def _size_of(image: ImageLike) -> tuple[int, int] | None:
        """The (width, height) of an image, of a file by its header; None of what cannot be read: counting says why."""
        try:
            if isinstance(image, (str, Path)):
                if not is_file(Path(image)):
                    return None
                header = read_header(Path(image))
                return header.width, header.height
            if isinstance(image, Image.Image):
                return image.size
            height, width = (image.pixels if isinstance(image, DecodedImage) else image).shape[:2]
        except (ImageError, AttributeError, ValueError):
            return None
        return (width, height) if min(width, height) > 0 else None

    def _tiles_of(self, size: tuple[int, int] | None) -> list[Box]:
        """The tiles of an image; none where its size is not known or needs too many: counting says so."""
        try:
            return [] if size is None else tile_boxes(*size, self.network.config.scene)
        except ImageError:
            return []

    def _check_in_time(self, exit: str, boxes: Sequence[Box], deadline_ms: float, most_ms: float) -> None:
        """Refuse a tiled image before it is decoded, if the first exit is foreseen to answer too late.

        Raises:
            DeadlineMissed: if decoding and counting take longer than ``most_ms``, as far as the profile tells.
        """
        config = self.network.config
        if config.view == "tiles":  # of those it is only foreseen once they are there
            return
        canvases = [canvas_size(width, height, config.size, config.view) for *_, width, height in boxes]
        counting, decoding = self._predicted_s(canvases, exit), self._times.ms(PREPARING)
        if counting is None or decoding is None:
            return
        # The profile's image has four times the pixels of the scene.
        pixels = sum(width * height for *_, width, height in boxes)
        decoding *= pixels / (4 * config.scene[0] * config.scene[1])
        # Half of the usual: formats differ, and what might be in time is tried.
        takes_ms = 1000 * counting + decoding / 2
        if takes_ms > most_ms:
            raise _too_late(deadline_ms, len(boxes), exit, takes_ms)

    def _exits_in_time(
        self, rows: Sequence[Row], exits: Sequence[str], begun: float, deadline: float, last_moment: float
    ) -> Sequence[str]:
        """The exits that may answer for the rows of a tiled image by the deadline: the first, and those foreseen to.

        Raises:
            DeadlineMissed: if the first is foreseen to answer after the last moment.
        """
        now = time.perf_counter()
        canvases = [(canvas.shape[1], canvas.shape[0]) for canvas, *_ in rows]
        predicted = {name: self._predicted_s(canvases, name) for name in exits}
        first = predicted[exits[0]]
        if first is not None and now + first > last_moment:
            raise _too_late(1000 * (deadline - begun), len(rows), exits[0], 1000 * (now + first - begun))
        if len(rows) <= self._rows(PIXELS_ABREAST):  # every tile comes to an exit before any goes on
            return exits
        fits = [name for name in exits[1:] if (s := predicted[name]) is not None and now + s <= deadline]
        return [exits[0], *fits]

    def _predicted_s(self, canvases: Sequence[tuple[int, int]], exit: str) -> float | None:
        """How long rows on such canvases will take at least until an exit's answer, in seconds; None: not known.

        Canvases smaller than the native size are reckoned by their pixels.
        """
        width, height = self.network.config.size
        steps = [LAYING, *map(stage_step, range(self.network.stage_of(exit) + 1)), exit_step(exit)]
        total = 0.0
        for size, alike in groupby(canvases):
            left = len(list(alike))
            while left > 0:
                together = min(left, self._tiles_at_once)
                ms: float | None = self._times.total_ms(steps, together, quantile=0)
                if ms is None:
                    return None
                total += ms / 1000 * min(1.0, size[0] * size[1] / (width * height))
                left -= together
        return total

    def _many(
        self,
        samples: Iterator[tuple[ImageLike, AudioLike | None] | None],
        exits: Sequence[str],
        policy: Policy,
        abreast: int,
    ) -> Iterator[CountResult | None]:
        """Count samples, abreast as many as have so many rows together."""
        begun = time.perf_counter()
        budget = policy if isinstance(policy, Budget) else None
        while True:
            scenes: list[Scene] = []
            order: list[int | None] = []
            if budget is not None:
                budget.window(scenes)
            results: list[list[ExitResult]] = [[] for _ in range(abreast)]
            executor = self._executor(exits, scenes, abreast)
            try:
                for output in executor.run(self._parts(samples, scenes, order, budget, abreast), policy):
                    self._write_down(output, results, scenes, executor, begun)
            except BudgetTooSmall:  # what had been answered by then is not lost
                yield from self._answered(order, results)
                raise
            if budget is not None:
                budget.finish()
            if not order:
                return
            yield from self._answered(order, results)

    def _answered(
        self, order: Sequence[int | None], results: Sequence[list[ExitResult]]
    ) -> Iterator[CountResult | None]:
        """Results in the order of the samples, up to the first one that no exit has answered."""
        for place in order:
            if place is not None and not results[place]:
                return
            yield None if place is None else self._last_chosen(results[place])

    def _last_chosen(self, results: Sequence[ExitResult]) -> CountResult:
        """Results of one image, of which the last is the answer."""
        return CountResult(self.model, results[-1], tuple(results), warnings=results[-1].warnings)

    def _write_down(
        self,
        output: BatchExitOutput | None,
        results: Sequence[list[ExitResult]],
        scenes: Sequence[Scene],
        executor: StageExecutor,
        begun: float,
    ) -> None:
        """Add what an exit has told of some samples, if it has, to what was said of each."""
        if output is None:
            return
        for at, number in enumerate(output.samples.tolist()):
            maps = [] if output.density is None else list(output.density[at])
            sums = (executor.feature_sums or {}).get(number)
            results[number].append(
                self._result(output.exit, float(output.values[at]), maps, scenes[number], sums, begun)
            )

    def _within(
        self,
        budget_ms: float,
        number: int,
        samples: Iterator[tuple[ImageLike, AudioLike | None] | None],
        exits: Sequence[str],
    ) -> Iterator[CountResult | None]:
        """Count a known number of samples within a time."""
        at_once = min(self._rows(PIXELS_AT_ONCE), max(1, number))
        times = self.profile
        errors = {has_audio: self.intervals.errors(has_audio=has_audio) for has_audio in (False, True)}

        def row_ms(step: str) -> float:
            ms = times.ms(step, at_once)
            assert ms is not None
            return ms / at_once

        def planned() -> Budget:
            costs = Costs(
                [row_ms(stage_step(index)) for index in range(len(self.network.stages))],
                {name: row_ms(exit_step(name)) for name in exits},
                {name: self.network.stage_of(name) for name in exits},
            )
            preparing_ms = (times.ms(PREPARING) or 0.0) + self._views * row_ms(LAYING)
            return Budget(budget_ms, number, exits, errors, costs, preparing_ms, self._views)

        try:
            budget = planned()
        except BudgetTooSmall:
            if self._measured:
                raise
            # The machine may have been busy when that was measured; who is refused runs nothing that would show it.
            times.forget()
            self._measure(times)
            budget = planned()
        yield from self._many(samples, exits, budget, self._rows(PIXELS_ABREAST))
        if budget.used_ms > (1 + TOLERANCE) * budget_ms:
            log.warning(
                "it took %.0f ms instead of %g, the machine was slower than measured", budget.used_ms, budget_ms
            )

    def _parts(
        self,
        samples: Iterable[tuple[ImageLike, AudioLike | None] | None],
        scenes: list[Scene],
        order: list[int | None],
        budget: Budget | None,
        most: int | None = None,
    ) -> Iterator[Part]:
        """Prepare samples one by one and put them together, as many as go through a stage at once, heard ones or not.

        Args:
            scenes: each image's is added to it.
            order: for each sample its number among the scenes is added to it, or None.
            most: rows; behind the sample that makes them full none is taken.
        """
        at_once = self._rows(PIXELS_AT_ONCE)
        together: list[list[Row]] = []
        taken = 0
        begun = time.perf_counter()
        for sample in samples:
            if sample is None:
                order.append(None)
                if budget is not None:
                    budget.skip()
                begun = time.perf_counter()
                continue
            scene, rows = prepared(*sample, self.network.config)
            self._times.note(PREPARING, 1, 1000 * (time.perf_counter() - begun))
            full = sum(map(len, together)) + len(rows) > at_once
            other = together and len(list(same_size_groups([*together[-1], *rows], at_once))) > 1
            if together and (full or other or scene.has_audio != scenes[-1].has_audio):
                yield self._part(len(scenes) - len(together), together, self._times)
                together = []
            order.append(len(scenes))
            scenes.append(scene)
            together.append(rows)
            taken += len(rows)
            if most is not None and taken >= most:
                break
            begun = time.perf_counter()
        if together:
            yield self._part(len(scenes) - len(together), together, self._times)

    def _result(
        self,
        name: str,
        count: float,
        maps: Sequence[NDArray[np.float32]],
        scene: Scene,
        sums: NDArray[np.float64] | None,
        begun: float,
    ) -> ExitResult:
        """An exit's answer to a scene.

        Args:
            count: as the network gives it. maps: of each of its rows, on their canvases; none of an exit without.
            sums: of its features, or None.
            begun: the time of the request.
        """
        if not math.isfinite(count):
            raise CounterError(f"{self.model}: the exit {name} did not give a number")
        # A regressor may undershoot zero; a crowd does not.
        count = max(0.0, count)
        familiar = self._is_familiar(sums)
        interval = self.intervals.around(name, count, has_audio=scene.has_audio, familiar=familiar)
        density = scene.density(maps) if maps else None
        audio: AudioStatus = scene.audio if not scene.has_audio or self.network.uses_audio(name) else "switched off"
        latency = 1000 * (time.perf_counter() - begun)
        return ExitResult(name, count, interval, latency, density, scene.warnings, audio, familiar)


def _too_late(within_ms: float, tiles: int, exit: str, takes_ms: float) -> DeadlineMissed:
    return DeadlineMissed(
        f"no exit can answer within {within_ms:g} ms: the image is cut into {tiles} tiles, for which the first, "
        f"{exit}, takes about {takes_ms:.0f} ms here"
    )


def check_deadline(deadline_ms: float | None) -> None:
    """Refuse a deadline that is over when it begins, before anything is loaded.

    Raises:
        CounterError: for one that is not positive.
    """
    if deadline_ms is not None and not deadline_ms > 0:
        raise CounterError(f"a deadline of {deadline_ms:g} ms cannot be kept")


def served_exits(network: MultiExitNetwork) -> list[str]:
    """The exits to run unless told otherwise: one a place, the one named like the place, and the final."""
    plain = [name for name in network.exit_names if name in network.places or name == FINAL]
    return plain if len(plain) > 1 else network.exit_names


def load(
    name: str | Path, *, runtime: str = "auto", exits: Sequence[str] | None = None, warm: bool = True
) -> CrowdCounter:
    """A counter with a shipped model's or a checkpoint's weights.

    Args:
        name: of a shipped model, or the path of a checkpoint or of an exported folder.
        runtime: ``auto``, or a name of :func:`crowdexit.runtimes.selection.names`.
        exits: names to serve; default: one a place, and the final exit.
        warm: get ready for images of the network's own size now; else, as for other sizes, at the first image.

    Raises:
        CrowdExitError: if there is no such model, checkpoint, runtime or exit.

    Examples:
        >>> import crowdexit
        >>> counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
        >>> counter.exits
        ['V0', 'V1', 'AV1', 'AV2', 'final']
    """
    keep_freed_memory()
    network, spec, selected = open_model(name, runtime)
    return CrowdCounter(network, spec.model, runtime=selected, exits=exits, warm=warm, **calibration_of(spec))


def _laid_out(rows: Sequence[Row], times: Profile) -> Features:
    begun = time.perf_counter()
    features = batch_of([(canvas, placement) for canvas, placement, _ in rows], [mel for *_, mel in rows])
    times.note(LAYING, len(rows), 1000 * (time.perf_counter() - begun))
    return features


def _itself(features: Features) -> Features:
    return features
