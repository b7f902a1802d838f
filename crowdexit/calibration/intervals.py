"""Intervals around counts: split-conformal, as wide as the errors of held-out images were.

The score of a held-out image is |ŷ − y| / (ŷ + 10): the error relative to the count itself, so that the interval
of a sparse scene is narrow and that of a dense one wide. With n scores, the ⌈(n + 1)·level⌉-th smallest is the width w
for which [ŷ − w(ŷ + 10), ŷ + w(ŷ + 10)] holds the truth of a further image of the same kind with probability
``level`` at least (Papadopoulos et al. 2002; Lei et al. 2018), whatever the network. Of images of another kind
nothing is promised.

Relative errors are not the same for small and large counts, so that each third of the counts has a width of its own
(Vovk et al. 2003), where there are enough images. A few dozen held-out images tell little of a third: with counts
of many more, by networks that were trained without them (cross-fitted, Barber et al. 2021), these give the shape of the
widths, the thirds and how their widths compare, and the held-out images one factor.

The mean of the same scores, times (ŷ + 10), is the error to expect of an exit: what a budget weighs against time.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from crowdexit.errors import CrowdExitError

_UNFAMILIAR = 2.0  # least width w for an image that is not familiar: from 0 to 3 times the count + 20
ROOM = 10.0  # heads that keep the relative error of an empty scene finite
_ROUNDING = 1e-9  # 0.9 / (1 - 0.9) is a hair above nine


class IntervalError(CrowdExitError):
    """A calibration that cannot be made, or that a checkpoint describes wrongly."""


@dataclass(frozen=True)
class Thirds:
    """Widths by the size of the count.

    Attributes:
        bounds: the counts where the second and the last third begin.
        widths: w of each third.
    """

    bounds: tuple[float, float]
    widths: tuple[float, float, float]

    def at(self, count: float) -> float:
        """The width for a count."""
        return self.widths[bisect_right(self.bounds, count)]


@dataclass(frozen=True)
class Intervals:
    """A network's calibration.

    Attributes:
        level: the probability that the interval holds the truth.
        without_audio, with_audio: width w by exit, for counts without and with audio, over all counts.
        samples, with_audio_samples: how many held-out images each was made of.
        without_audio_errors, with_audio_errors: mean score by exit; empty where a checkpoint was calibrated without.
        without_audio_thirds, with_audio_thirds: widths by the size of the count, by exit, which go before the others.
    """

    level: float = 0.9
    without_audio: Mapping[str, float] = field(default_factory=dict)
    with_audio: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0
    without_audio_errors: Mapping[str, float] = field(default_factory=dict)
    with_audio_errors: Mapping[str, float] = field(default_factory=dict)
    with_audio_samples: int = 0
    without_audio_thirds: Mapping[str, Thirds] = field(default_factory=dict)
    with_audio_thirds: Mapping[str, Thirds] = field(default_factory=dict)

    def around(
        self, exit: str, count: float, *, has_audio: bool, familiar: bool | None = None
    ) -> tuple[float, float] | None:
        """(low, high) for a count of this exit; None where it was not calibrated in that state.

        Args:
            familiar: False widens it to 0 and to 3 times the count + 20 at least.
        """
        half = self.half_width(exit, count, has_audio=has_audio, familiar=familiar)
        return None if half is None else (max(0.0, count - half), count + half)

    def half_width(self, exit: str, count: float, *, has_audio: bool, familiar: bool | None = None) -> float | None:
        """How far the interval reaches from a count of this exit, in people; None as of :meth:`around`."""
        width = (self.with_audio if has_audio else self.without_audio).get(exit)
        if width is None:
            return None
        thirds = (self.with_audio_thirds if has_audio else self.without_audio_thirds).get(exit)
        half = (width if thirds is None else thirds.at(count)) * (count + ROOM)
        return half if familiar is not False else max(half, _UNFAMILIAR * (count + ROOM))

    def errors(self, *, has_audio: bool) -> Mapping[str, float]:
        """Each exit's expected error over (count + 10), or its width, which is in proportion: of all exits the same.

        With audio from what was calibrated with it, if that has all exits. Empty where nothing has.
        """
        tables = [self.without_audio_errors, self.without_audio]
        if has_audio:
            tables = [self.with_audio_errors, self.with_audio, *tables]
        every = set().union(*tables)
        return next((table for table in tables if table.keys() >= every), {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""
        return {
            "level": self.level,
            "silent": dict(self.without_audio),
            "heard": dict(self.with_audio),
            "samples": self.samples,
            "silent_errors": dict(self.without_audio_errors),
            "heard_errors": dict(self.with_audio_errors),
            "heard_samples": self.with_audio_samples,
            "silent_thirds": {name: asdict(thirds) for name, thirds in self.without_audio_thirds.items()},
            "heard_thirds": {name: asdict(thirds) for name, thirds in self.with_audio_thirds.items()},
        }

    @classmethod
    def from_dict(cls, data: Any) -> Intervals:
        """Read what :meth:`to_dict` wrote; None is no calibration.

        Raises:
            IntervalError: for anything else.
        """
        if data is None:
            return cls()
        try:
            tables: dict[str, Any] = {"without_audio": data["silent"], "with_audio": data["heard"]}
            tables |= {
                "without_audio_errors": data.get("silent_errors", {}),
                "with_audio_errors": data.get("heard_errors", {}),
            }
            scores = {key: {str(k): float(v) for k, v in table.items()} for key, table in tables.items()}
            if any(not 0 <= score < math.inf for table in scores.values() for score in table.values()):
                raise ValueError
            fields: dict[str, Any] = {
                **scores,
                "without_audio_thirds": _read_thirds(data.get("silent_thirds", {})),
                "with_audio_thirds": _read_thirds(data.get("heard_thirds", {})),
                "samples": int(data["samples"]),
                "with_audio_samples": int(data.get("heard_samples", 0)),
            }
            return cls(float(data["level"]), **fields)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise IntervalError("the checkpoint's intervals are damaged") from None


def width(counts: Sequence[float], truths: Sequence[float], level: float) -> float:
    """The conformal width w of an exit from its counts of held-out images and the true ones.

    Raises:
        IntervalError: for a level outside 0 to 1, or too few images to promise it.
    """
    return sorted(_scores(counts, truths))[rank(len(counts), level) - 1]


def thirds(
    counts: Sequence[float],
    truths: Sequence[float],
    level: float,
    cross_fitted: tuple[Sequence[float], Sequence[float]] | None = None,
) -> Thirds | None:
    """The conformal widths of an exit by thirds of its counts of held-out images.

    Args:
        counts, truths: of the held-out images. cross_fitted: counts of other images by networks that were trained
            without them, and the true ones: what gives the widths their shape.

    Returns:
        None where a third has too few images for the level.
    """
    if cross_fitted is not None and (shape := thirds(*cross_fitted, level)) is not None:
        factors = [s / max(shape.at(c), 1e-6) for s, c in zip(_scores(counts, truths), counts, strict=True)]
        factor = sorted(factors)[rank(len(factors), level) - 1]
        low, middle, high = shape.widths
        return Thirds(shape.bounds, (factor * low, factor * middle, factor * high))
    order = sorted(range(len(counts)), key=lambda i: counts[i])
    first, second = len(order) // 3, 2 * len(order) // 3
    parts = order[:first], order[first:second], order[second:]
    try:
        low, middle, high = (width([counts[i] for i in part], [truths[i] for i in part], level) for part in parts)
    except IntervalError:
        return None
    return Thirds((max(0.0, counts[order[first]]), max(0.0, counts[order[second]])), (low, middle, high))


def rank(samples: int, level: float) -> int:
    """Of so many held-out images' scores, the smallest first, the number of the one that is the width.

    Raises:
        IntervalError: as of :func:`width`.
    """
    if not 0 < level < 1:
        raise IntervalError(f"a level of {level:g} is no probability between 0 and 1")
    number = math.ceil((samples + 1) * level - _ROUNDING)
    if number > samples:
        needed = math.ceil(level / (1 - level) - _ROUNDING)
        raise IntervalError(f"{samples} images are too few for a level of {level:g}; at least {needed} are needed")
    return number


def expected_error(counts: Sequence[float], truths: Sequence[float]) -> float:
    """The mean score of an exit, from its counts of held-out images and the true ones; one image at least."""
    return math.fsum(_scores(counts, truths)) / len(counts)


def _read_thirds(data: Any) -> dict[str, Thirds]:
    """Each exit's thirds, as they stand in a checkpoint's header.

    Raises:
        ValueError, TypeError, KeyError: if they are damaged.
    """
    read = {}
    for name, of_exit in data.items():
        (first, second), (low, middle, high) = map(float, of_exit["bounds"]), map(float, of_exit["widths"])
        if not 0 <= first <= second < math.inf or not all(0 <= width < math.inf for width in (low, middle, high)):
            raise ValueError
        read[str(name)] = Thirds((first, second), (low, middle, high))
    return read


def _scores(counts: Sequence[float], truths: Sequence[float]) -> list[float]:
    return [abs(c - t) / (max(c, 0.0) + ROOM) for c, t in zip(counts, truths, strict=True)]
