"""The door for callers: an image and perhaps audio go in, counts come out as the exits answer."""

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
        runtime: how stages and exits are run.
        exits: names to use; default: one at each location, and the final exit (:func:`default_exits`).
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
        """The (width, height) at which an image is counted without being cut into tiles."""
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
        """How long every stage and exit takes here, read or measured when it is first asked for.

        Measuring takes some seconds: :attr:`crowdexit.inference.latency.Latency.profile`.
        """
        return self.predictor.latency.profile

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
            _ = self.profile  # by which it is predicted when the exits will answer
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
        wanted = self.exits if exits is None else self._known(exits)
        self.predictor.get_ready(wanted, None)
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            raise CounterError("a deadline applies to single images; set a budget for many")
        if budget_ms is None:
            return self.predictor.stream_many(iter(samples), wanted, policy, self.predictor.collator.rows_in_batch)
        if policy is not ANYTIME:
            raise CounterError("a budget is a policy itself")
        check_budget(budget_ms, wanted[0], self.intervals.errors(has_audio=False))
        if number is None:
            if not isinstance(samples, Sized):
                raise CounterError("a budget has to know the number of images")
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
        """Run up to an exit for nothing: the first image after loading takes longer than those that come after it.

        Args:
            exit: as of :meth:`count`.
        """
        self.predictor.latency.warm_up(self._up_to(exit))

    def first_answer(self, exit: str = "auto") -> tuple[str, float]:
        """The first exit on the way to one, and about when it answers here for an image of :attr:`size`, in ms.

        It is measured now, once, after :meth:`warm_up`; a longer look is the :attr:`profile`.

        Args:
            exit: as of :meth:`count`.
        """
        first = self._up_to(exit)[0]
        return first, self.predictor.latency.measured_ms(first)

    def make_ready_for(self, policy: Policy) -> None:
        """Do what a policy with a deadline needs before any time begins: ``DeepestThatFits`` goes by the profile.

        Raises:
            CounterError: for a policy that has nothing to go by.
        """
        self._check(policy)
        if isinstance(policy, DeepestThatFits):
            _ = self.profile

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
        return self.predictor.collator.all_prepared(samples, self.predictor.latency.times)

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
        return self.predictor.run(ready, self._up_to(exit), policy)

    def _known(self, exits: Sequence[str]) -> list[str]:
        if not exits:
            raise CounterError("no exit is named")
        for name in exits:
            if name not in self.network.exit_names:
                raise CounterError(f"no exit {name!r} in {self.model} (it has {', '.join(self.network.exit_names)})")
        return [name for name in self.network.exit_names if name in exits]

    def _up_to(self, exit: str) -> list[str]:
        """The exits on the way to one, and that one; ``auto`` is the last that this counter serves."""
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
        """The (width, height) of an image that is counted whole, None of others; and the tiles of one that is tiled.

        Of an image that cannot be read or needs too many tiles there are none: counting says so.
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
