"""Count people in images, optionally with audio, with early results from each exit."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import get_args

from PIL import Image

from crowdexit.calibration.familiarity import Familiarity
from crowdexit.calibration.intervals import Intervals
from crowdexit.data.image import DecodedImage, ImageError, read_header
from crowdexit.data.views import Box, scaled_size, tile_boxes
from crowdexit.inference.anytime import DeadlineMissed, answers_by
from crowdexit.inference.budget import TOLERANCE, check_budget
from crowdexit.inference.collate import Prepared, Sample
from crowdexit.inference.deadline import Late, check_before_decoding, check_deadline, latest_ms
from crowdexit.inference.errors import CounterError
from crowdexit.inference.executor import Policy
from crowdexit.inference.models import calibration_of, open_model
from crowdexit.inference.planner import plan_budget
from crowdexit.inference.policies import ANYTIME, Confident, DeepestThatFits
from crowdexit.inference.predictor import Predictor
from crowdexit.inference.preprocessing import AudioLike, ImageLike
from crowdexit.inference.profile import Profile
from crowdexit.models.network import FINAL, MultiExitNetwork
from crowdexit.results import CountResult, ExitResult
from crowdexit.runtimes.base import Runtime
from crowdexit.runtimes.selection import select_runtime
from crowdexit.utils.memory import keep_freed_memory
from crowdexit.utils.paths import is_file

log = logging.getLogger(__name__)


class CrowdCounter:
    """Counts people with one network on one runtime.

    Args:
        network: with its weights.
        model: the name to report.
        runtime: runs the stages and exits.
        exits: names to use; default: one at each location, and the final exit (:func:`default_exits`).
        intervals: the checkpoint's calibration.
        familiarity: its statistics of the training images, or None.
        warm: prepare for images of the network's size now rather than at the first image.

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
            raise CounterError(f"{model} is a classifier; it does not count")
        self.network = network
        self.model = model
        self.exits = default_exits(network) if exits is None else self._known(exits)
        self.chain = (runtime or select_runtime("auto")).ready(network)
        self.predictor = Predictor(network, model, self.chain, intervals or Intervals(), familiarity)
        if warm:
            self.predictor.get_ready(self.exits, None)

    @property
    def size(self) -> tuple[int, int]:
        """The largest (width, height) of an image that is not tiled."""
        return self.network.config.scene

    @property
    def intervals(self) -> Intervals:
        """The checkpoint's calibration."""
        return self.predictor.intervals

    @property
    def familiarity(self) -> Familiarity | None:
        """The checkpoint's statistics of its training images."""
        return self.predictor.familiarity

    @property
    def profile(self) -> Profile:
        """Latency of every stage and exit on this machine, read or measured on first access.

        Measuring takes some seconds: :attr:`crowdexit.inference.latency.Latency.profile`.
        """
        return self.predictor.latency.profile

    def stream(
        self, image: ImageLike, audio: AudioLike | None = None, *, exits: Sequence[str] | None = None
    ) -> Iterator[ExitResult]:
        """Yield each exit's result as soon as it is computed; if the caller stops, the rest is not computed.

        Args:
            image: H×W×3 uint8 RGB or H×W grey, a Pillow image, or a file; a
                :class:`crowdexit.data.image.DecodedImage` adds its warnings.
            audio: a file, (waveform, sample rate) or (sample rate, waveform with its channels last, as
                ``scipy.io.wavfile`` and Gradio give it), a log-mel (96, 64), or None: no audio; an
                :class:`crowdexit.data.mel.AudioInput` states why there is none, or adds warnings.
            exits: names; default: all exits of this counter.

        An image more than four times the native size is tiled, and the counts of the tiles are added; audio, which
        belongs to the whole image, is then not used.

        Raises:
            CrowdExitError: for an unusable image or audio.

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
        wanted = self.exits if exits is None else self._known(exits)
        self.predictor.get_ready(wanted, self._layout(image)[0])
        for result in self.predictor.stream((image, audio), wanted, ANYTIME, time.perf_counter()):
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
        """Count with the exits up to ``exit`` and return the last result.

        Args:
            image: as of :meth:`stream`.
            audio: as of :meth:`stream`.
            exit: the last exit to run; ``auto``: the last of this counter.
            deadline_ms: return the latest result after this time, even in the middle of a stage. It includes preparing
                the image, and waiting for the layer (with torch.compile, the stage) or the decoding that an earlier
                request of this process still runs. An error after the first result is logged as a warning.
            late: if no exit has a result by then, ``wait`` for the first, or ``fail``. A tiled image is refused before
                it is computed if its first exit is predicted to be late (``fail``), or later than ten times the
                deadline (``wait``).
            policy: which exits run, and when to exit (:mod:`crowdexit.inference.policies`). For ``DeepestThatFits``
                latency is measured once, before the deadline starts.

        Raises:
            DeadlineMissed: if no exit has a result and ``late`` is ``fail``; for a tiled image, if that is predicted.
            CrowdExitError: as :meth:`stream`; for a deadline that is not positive, or a policy without the
                calibration it needs.

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
        if late not in get_args(Late):
            raise CounterError(f"late is one of {', '.join(get_args(Late))}, not {late!r}")
        if deadline_ms is not None:
            return self._count_by(deadline_ms, late, (image, audio), exit, policy)
        self._check_without_deadline(policy)
        wanted = self._up_to(exit)
        self.predictor.get_ready(wanted, self._layout(image)[0])
        begun = time.perf_counter()
        results = list(filter(None, self.predictor.stream((image, audio), wanted, policy, begun)))
        return CountResult(self.model, results[-1], tuple(results), warnings=results[-1].warnings)

    def _count_by(self, deadline_ms: float, late: Late, sample: Sample, exit: str, policy: Policy) -> CountResult:
        """Count an image by a deadline; see :meth:`count`."""
        self.make_ready_for(policy)
        wanted, most_ms = self._up_to(exit), latest_ms(deadline_ms, late)
        size, tiles = self._layout(sample[0])
        if tiles:
            _ = self.profile  # predicts the exits' latency
            check_before_decoding(self.predictor.latency, self.network.config, wanted[0], tiles, deadline_ms, most_ms)
        self.predictor.get_ready(wanted, size)
        begun = time.perf_counter()
        deadline, last_moment = begun + deadline_ms / 1000, begun + most_ms / 1000
        steps = self.predictor.stream(sample, wanted, policy, begun, deadline, last_moment)
        answers = answers_by(deadline, steps, wait=late == "wait")
        results = [result for result in answers if result.latency_ms <= deadline_ms]
        if not results and late == "wait":
            results = answers[:1]
        if not results:
            nominal = self.predictor.latency.nominal_ms(wanted[0])
            note = "" if nominal is None else f" (the first, {wanted[0]}, takes about {nominal:.0f} ms here)"
            note = "; the image is cut into tiles" if tiles else note
            raise DeadlineMissed(f"no exit answered within {deadline_ms:g} ms{note}")
        chosen = next((result for result in results if result.exit == wanted[-1]), results[-1])
        return CountResult(self.model, chosen, tuple(results), chosen.latency_ms <= deadline_ms, chosen.warnings)

    def count_many(
        self,
        samples: Iterable[tuple[ImageLike, AudioLike | None] | None],
        *,
        exits: Sequence[str] | None = None,
        policy: Policy = ANYTIME,
        budget_ms: float | None = None,
        number: int | None = None,
    ) -> Iterator[CountResult | None]:
        """Count many images in batches; counts do not depend on the batching.

        Args:
            samples: images with their audio, as of :meth:`stream`, read lazily; None yields None.
            exits: names; default: all exits of this counter.
            policy: decides where each image exits.
            budget_ms: time for all images, from the first ``next()`` on, including what the caller does between two
                results. Exits are chosen to minimise the expected error (:mod:`crowdexit.inference.budget`). Latency
                is measured once, before the time starts.
            number: number of samples, for a budget; default: their length.

        Yields:
            Results in the order of the samples; the chosen exit is the last. Latencies count from the first
            ``next()`` on.

        Raises:
            BudgetError: for a budget that is not positive, or a network that is not calibrated.
            BudgetTooSmall: if the first exits alone exceed the budget: at the first result by the profile, or later
                by the measured time.
            CrowdExitError: as :meth:`stream`; for a policy without the calibration it needs.

        Examples:
            >>> import crowdexit
            >>> counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
            >>> results = counter.count_many([("street.jpg", None), ("crowd.jpg", None)])
            >>> [result.chosen.exit for result in results]
            ['final', 'final']
        """
        wanted = self.exits if exits is None else self._known(exits)
        self.predictor.get_ready(wanted, None)
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            raise CounterError("a deadline applies to single images; set a budget for many")
        if budget_ms is None:
            return self.predictor.stream_many(iter(samples), wanted, policy, self.predictor.collator.rows_in_batch)
        if policy is not ANYTIME:
            raise CounterError("a budget cannot be combined with a policy")
        check_budget(budget_ms, wanted[0], self.intervals.errors(has_audio=False))
        if number is None:
            if not isinstance(samples, Sized):
                raise CounterError("a budget needs the number of images")
            number = len(samples)
        return self._within(budget_ms, number, iter(samples), wanted)

    def _within(
        self, budget_ms: float, number: int, samples: Iterator[Sample | None], exits: Sequence[str]
    ) -> Iterator[CountResult | None]:
        """Count a known number of samples within a time."""
        predictor = self.predictor
        budget = plan_budget(
            budget_ms, number, exits, network=self.network, intervals=self.intervals, latency=predictor.latency
        )
        yield from predictor.stream_many(samples, exits, budget, predictor.collator.rows_in_flight)
        if budget.used_ms > (1 + TOLERANCE) * budget_ms:
            log.warning(
                "it took %.0f ms instead of %g, the machine was slower than measured", budget.used_ms, budget_ms
            )

    def warm_up(self, exit: str = "auto") -> None:
        """Run once up to an exit and discard the result, as the first image after loading is slower.

        Args:
            exit: as of :meth:`count`.
        """
        self.predictor.latency.warm_up(self._up_to(exit))

    def first_answer(self, exit: str = "auto") -> tuple[str, float]:
        """The first exit up to ``exit``, and its latency for an image of :attr:`size`, in ms.

        Measured once, after :meth:`warm_up`; the :attr:`profile` is more precise.

        Args:
            exit: as of :meth:`count`.
        """
        first = self._up_to(exit)[0]
        return first, self.predictor.latency.measured_ms(first)

    def make_ready_for(self, policy: Policy) -> None:
        """Prepare for a policy before a deadline starts: ``DeepestThatFits`` needs the profile.

        Raises:
            CounterError: for a policy without the calibration it needs.
        """
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            _ = self.profile

    def size_for(self, width: int, height: int) -> tuple[int, int] | None:
        """The (width, height) to which an image of that size may be downscaled beforehand, to save work.

        None: it will be tiled.
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
        """Prepare images with their audio, as of :meth:`stream`, for :meth:`answers`.

        Other threads may prepare while this counter counts. All images are in memory at once.

        Raises:
            CrowdExitError: for an unusable image or audio.
        """
        return self.predictor.collator.all_prepared(samples, self.predictor.latency.times)

    def answers(self, ready: Prepared, *, exit: str = "auto", policy: Policy = ANYTIME) -> list[CountResult]:
        """Count the output of :meth:`prepare`, which may be reused; one result for each image, in order.

        Args:
            exit: as of :meth:`count`; earlier exits run only if the policy may use them.
            policy: decides where each image exits.

        Latencies are those of the whole batch, including preparation.

        Raises:
            CrowdExitError: for an unknown exit, or a policy without the calibration it needs.
        """
        self._check_without_deadline(policy)
        return self.predictor.run(ready, self._up_to(exit), policy)

    def _known(self, exits: Sequence[str]) -> list[str]:
        if not exits:
            raise CounterError("no exit is named")
        for name in exits:
            if name not in self.network.exit_names:
                raise CounterError(f"no exit {name!r} in {self.model} (it has {', '.join(self.network.exit_names)})")
        return [name for name in self.network.exit_names if name in exits]

    def _up_to(self, exit: str) -> list[str]:
        """The exits up to ``exit``, inclusive; ``auto``: the last of this counter."""
        last = self.exits[-1] if exit == "auto" else self._known([exit])[0]
        names = self.network.exit_names
        return self._known([*(name for name in names[: names.index(last)] if name in self.exits), last])

    def _check(self, policy: Policy) -> None:
        if isinstance(policy, Confident) and not self.intervals.without_audio:
            raise CounterError(f"{self.model} has no intervals to decide confidence with; run `crowdexit calibrate`")

    def _check_without_deadline(self, policy: Policy) -> None:
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            raise CounterError("the policy 'fits' needs a deadline")

    def _layout(self, image: ImageLike) -> tuple[tuple[int, int] | None, list[Box]]:
        """The (width, height) of an untiled image, else None; and the tiles of a tiled one.

        Unreadable images and those with too many tiles have none; counting raises the error.
        """
        size = _size_of(image)
        try:
            tiles = [] if size is None else tile_boxes(*size, self.network.config.scene)
        except ImageError:
            return size, []
        return (None, tiles) if len(tiles) > 1 else (size, [])


def default_exits(network: MultiExitNetwork) -> list[str]:
    """The exits that run by default: at each location the one named like it, and the final exit."""
    plain = [name for name in network.exit_names if name in network.places or name == FINAL]
    return plain if len(plain) > 1 else network.exit_names


def load(
    name: str | Path, *, runtime: str = "auto", exits: Sequence[str] | None = None, warm: bool = True
) -> CrowdCounter:
    """A counter with a shipped model's or a checkpoint's weights.

    Args:
        name: of a shipped model, or the path of a checkpoint or of an exported folder.
        runtime: ``auto``, or a name of :func:`crowdexit.runtimes.selection.names`.
        exits: names to use; default: one at each location, and the final exit.
        warm: prepare for images of the network's size now rather than at the first image.

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


def _size_of(image: ImageLike) -> tuple[int, int] | None:
    """The (width, height) of an image, of a file by its header; None if unreadable (counting raises the error)."""
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
