"""Every exit's error on a prepared set: of counts with or without audio, under chosen conditions, or of classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdexit.calibration.familiarity import Familiarity, FamiliarityError, fit
from crowdexit.calibration.intervals import IntervalError, Intervals, Thirds, expected_error, rank, thirds, width
from crowdexit.calibration.temperatures import Measure, Temperatures
from crowdexit.data.augment import Conditions
from crowdexit.data.classes import ClassStore
from crowdexit.data.image import decode_pixels
from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError
from crowdexit.evaluation import classify
from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.models import calibration_of, open_model
from crowdexit.results import ExitResult
from crowdexit.utils.memory import keep_freed_memory

log = logging.getLogger(__name__)


def read_for_counting(
    store: Store, split: str, id: str, *, audio: bool = True, conditions: Conditions = Conditions()
) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None, float, str]:
    """(image, log-mel or None, count, audio source) of a stored sample under conditions fixed by its id."""
    sample = store.read(split, id)
    image = decode_pixels(sample.image.tobytes(), f"{split}/{id}")
    seed = np.frombuffer(id.encode(), np.uint8)
    image = conditions.apply(image, np.random.default_rng(seed))
    return image, sample.log_mel if audio else None, sample.count, sample.audio_source


@dataclass(frozen=True)
class Counted:
    """A counted sample: its id, the true count, the source of its audio, and each exit's result."""

    id: str
    truth: float
    audio: str
    results: tuple[ExitResult, ...]


def count_samples(
    counter: CrowdCounter,
    store: Store,
    split: str,
    ids: Sequence[str],
    *,
    audio: bool = True,
    only_with_audio: bool = False,
    conditions: Conditions = Conditions(),
    progress: Any = None,
) -> Iterator[Counted]:
    """Count the samples of a split with every exit of the counter.

    The first sample runs once beforehand as a warm-up.

    Args:
        ids: of the samples.
        audio: False: count without audio even if there is some.
        only_with_audio: skip samples without audio, and tiled ones.
        progress: called after each sample.
    """
    warm = False
    for id in ids:
        image, mel, count, source = read_for_counting(store, split, id, audio=audio, conditions=conditions)
        has_audio = mel is not None and counter.size_for(image.shape[1], image.shape[0]) is not None
        if has_audio or not only_with_audio:
            if not warm:
                for _ in counter.stream(image, mel):
                    pass
                warm = True
            yield Counted(id, count, source if has_audio else "none", tuple(counter.stream(image, mel)))
        if progress is not None:
            progress()


def evaluate(
    counter: CrowdCounter,
    store: Store,
    split: str,
    ids: Sequence[str],
    *,
    audio: bool = True,
    conditions: Conditions = Conditions(),
    progress: Any = None,
) -> dict[str, Any]:
    """MAE, RMSE and mean latency of each exit, of the samples that :func:`count_samples` counts.

    Returns:
        ``{"split", "audio", "samples", "exits": [{"exit", "mae", "rmse", "latency_ms"}]}``; ``audio`` is where
        the audio came from (``recorded``, ``simulated``, ``none``, or ``mixed``). Where all exits are
        calibrated, also ``level``, how many per cent of the truths their intervals should hold, and in each row
        ``covered``, how many they do; of the very images that calibrated them that many do by construction.
    """
    counted = list(count_samples(counter, store, split, ids, audio=audio, conditions=conditions, progress=progress))
    sources = {sample.audio for sample in counted}
    errors = {name: np.array([_of(s, name).count - s.truth for s in counted]) for name in counter.exits}
    result: dict[str, Any] = {
        "split": split,
        "audio": sources.pop() if len(sources) == 1 else "mixed",
        "samples": len(ids),
        "exits": [
            {
                "exit": name,
                "mae": float(np.mean(np.abs(errors[name]))),
                "rmse": float(np.sqrt(np.mean(np.square(errors[name])))),
                "latency_ms": float(np.mean([_of(s, name).latency_ms for s in counted])),
            }
            for name in counter.exits
        ],
    }
    covered = {name: _covered(counted, name) for name in counter.exits}
    if None not in covered.values():
        result["level"] = 100 * counter.intervals.level
        for row in result["exits"]:
            row["covered"] = covered[row["exit"]]
    return result


def _covered(counted: Sequence[Counted], name: str) -> float | None:
    """How many per cent of the truths lie in an exit's intervals; None where one has no interval."""
    pairs = [(_of(sample, name).interval, sample.truth) for sample in counted]
    inside = [interval[0] <= truth <= interval[1] for interval, truth in pairs if interval is not None]
    return 100 * float(np.mean(inside)) if len(inside) == len(pairs) else None


def _of(sample: Counted, name: str) -> ExitResult:
    return next(result for result in sample.results if result.exit == name)


def calibrate(
    counter: CrowdCounter,
    store: Store,
    split: str,
    ids: Sequence[str],
    level: float,
    *,
    cross_fitted: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None,
    progress: Any = None,
) -> Intervals:
    """Split-conformal intervals and expected errors of every exit that the counter serves, from held-out samples.

    Without audio from all of them, with audio from those that have some; where these are too few, a warning says so,
    and there are none with audio.

    Args:
        cross_fitted: counts and true counts by exit (:func:`crowdexit.calibration.intervals.thirds`).
        progress: called twice a sample: counted or passed over without audio, and with it.

    Raises:
        IntervalError: for a level that is no probability, or too few samples for it.
    """

    def tables(counted: Sequence[Counted]) -> tuple[dict[str, float], dict[str, float], dict[str, Thirds]]:
        truths = [sample.truth for sample in counted]
        counts = {name: [_of(sample, name).count for sample in counted] for name in counter.exits}
        widths = {name: width(of_exit, truths, level) for name, of_exit in counts.items()}
        by_size = {name: thirds(of_exit, truths, level, others.get(name)) for name, of_exit in counts.items()}
        known = {name: of_exit for name, of_exit in by_size.items() if of_exit is not None}
        return widths, {name: expected_error(of_exit, truths) for name, of_exit in counts.items()}, known

    others = cross_fitted or {}
    rank(len(ids), level)  # refuses before anything is counted
    plain = list(count_samples(counter, store, split, ids, audio=False, progress=progress))
    without_audio, without_audio_errors, without_audio_thirds = tables(plain)
    with_audio, with_audio_errors, with_audio_thirds = dict[str, float](), dict[str, float](), dict[str, Thirds]()
    audible = list(count_samples(counter, store, split, ids, only_with_audio=True, progress=progress))
    if audible:
        try:
            with_audio, with_audio_errors, with_audio_thirds = tables(audible)
        except IntervalError as error:
            log.warning(
                "not calibrated with audio: %s; samples with audio have no interval and are never confident", error
            )
            audible = []
    return Intervals(
        level,
        without_audio,
        with_audio,
        samples=len(ids),
        without_audio_errors=without_audio_errors,
        with_audio_errors=with_audio_errors,
        with_audio_samples=len(audible),
        without_audio_thirds=without_audio_thirds,
        with_audio_thirds=with_audio_thirds,
    )


def measure_familiarity(
    counter: CrowdCounter, store: Store, split: str, ids: Sequence[str], *, progress: Any = None
) -> Familiarity | None:
    """Statistics of the training images; None, with a warning, where these are too few or the network has no maps.

    Args:
        progress: called after each image.
    """
    sums = []
    for id in ids:
        of_one = counter.predictor.feature_sums(decode_pixels(store.read(split, id).image.tobytes(), f"{split}/{id}"))
        if of_one is None:
            return None
        sums.append(of_one)
        if progress is not None:
            progress()
    try:
        return fit(sums)
    except FamiliarityError as error:
        log.warning("whether images are familiar will not be known: %s", error)
        return None


def evaluate_file(
    model: str | Path,
    data: Path,
    split: str,
    pattern: str = "*",
    *,
    audio: bool = True,
    conditions: Conditions = Conditions(),
    leave: tuple[Measure, float] | None = None,
    runtime: str = "auto",
    progress: Callable[[int], AbstractContextManager[Any]] = lambda total: nullcontext(),
) -> dict[str, Any]:
    """Every exit of a model on a prepared file: :func:`evaluate` of a counter, ``classify.evaluate`` of a classifier.

    Args:
        model: name of a shipped model, a checkpoint, or an exported folder.
        pattern: shell pattern of the ids to use.
        leave: of a classifier: the measure of uncertainty, and the bound at which samples exit.
        progress: given the number of images, a context whose value is called after each.

    Raises:
        CrowdExitError: if model, file, split or conditions are of no use, or no id matches.
    """
    keep_freed_memory()
    network, spec, selected = open_model(model, runtime)
    if network.classifies:
        if conditions != Conditions():
            raise CrowdExitError("brightness, noise and black areas are for counting; classes are reported as they are")
        leaving = leave and classify.EarlyExitRule(*leave, Temperatures.from_dict(spec.meta.get("temperatures")))
        with ClassStore(data) as classes:
            wanted = classify.matching(classes, split, pattern)
            with progress(len(wanted)) as advance:
                return classify.evaluate(
                    selected.ready(network), classes, split, wanted, leaving=leaving, progress=advance
                )
    if leave is not None:
        raise CrowdExitError("confidence and entropy are of classes; a counter is confident by its intervals")
    counter = CrowdCounter(network, spec.model, runtime=selected, exits=network.exit_names, **calibration_of(spec))
    with Store(data) as store:
        samples = store.ids(split, pattern)
        with progress(len(samples)) as advance:
            return evaluate(counter, store, split, samples, audio=audio, conditions=conditions, progress=advance)
