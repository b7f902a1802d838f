"""Intervals around counts: split-conformal, as wide as the errors of held-out pictures were.

The score of a held-out picture is |ŷ − y| / (ŷ + 10): the error relative to the count itself, so that the interval
of a sparse scene is narrow and that of a dense one wide. With n scores, the ⌈(n + 1)·level⌉-th smallest is the width w
for which [ŷ − w(ŷ + 10), ŷ + w(ŷ + 10)] holds the truth of a further picture of the same kind with probability
``level`` at least (Papadopoulos et al. 2002; Lei et al. 2018), whatever the network. Of pictures of another kind
nothing is promised.

The mean of the same scores, times (ŷ + 10), is the error to expect of an exit: what a budget weighs against time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from crowdexit.errors import CrowdExitError

ROOM = 10.0  # heads that keep the relative error of an empty scene finite
_ROUNDING = 1e-9  # 0.9 / (1 - 0.9) is a hair above nine


class IntervalError(CrowdExitError):
    """A calibration that cannot be made, or that a checkpoint describes wrongly."""


@dataclass(frozen=True)
class Intervals:
    """A network's calibration.

    Attributes:
        level: the probability that the interval holds the truth.
        silent, heard: width w by exit, for counts without and with sound.
        samples, heard_samples: how many held-out pictures each was made of.
        silent_errors, heard_errors: mean score by exit; empty where a checkpoint was calibrated without.
    """

    level: float = 0.9
    silent: Mapping[str, float] = field(default_factory=dict)
    heard: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0
    silent_errors: Mapping[str, float] = field(default_factory=dict)
    heard_errors: Mapping[str, float] = field(default_factory=dict)
    heard_samples: int = 0

    def around(self, exit: str, count: float, *, heard: bool) -> tuple[float, float] | None:
        """(low, high) for a count of this exit; None where it was not calibrated in that state."""
        half = self.half_width(exit, count, heard=heard)
        return None if half is None else (max(0.0, count - half), count + half)

    def half_width(self, exit: str, count: float, *, heard: bool) -> float | None:
        """How far the interval reaches from a count of this exit, in people; None as of :meth:`around`."""
        width = (self.heard if heard else self.silent).get(exit)
        return None if width is None else width * (count + ROOM)

    def errors(self, *, heard: bool) -> Mapping[str, float]:
        """Each exit's expected error over (count + 10), or its width, which is in proportion: of all exits the same.

        With sound from what was calibrated with it, if that has all exits. Empty where nothing has.
        """
        tables = [self.silent_errors, self.silent]
        if heard:
            tables = [self.heard_errors, self.heard, *tables]
        every = set().union(*tables)
        return next((table for table in tables if table.keys() >= every), {})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""
        return {
            "level": self.level,
            "silent": dict(self.silent),
            "heard": dict(self.heard),
            "samples": self.samples,
            "silent_errors": dict(self.silent_errors),
            "heard_errors": dict(self.heard_errors),
            "heard_samples": self.heard_samples,
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
            tables = {"silent": data["silent"], "heard": data["heard"]}
            tables |= {key: data.get(key, {}) for key in ("silent_errors", "heard_errors")}
            scores = {key: {str(k): float(v) for k, v in table.items()} for key, table in tables.items()}
            if any(not 0 <= score < math.inf for table in scores.values() for score in table.values()):
                raise ValueError
            heard_samples = int(data.get("heard_samples", 0))
            return cls(float(data["level"]), samples=int(data["samples"]), heard_samples=heard_samples, **scores)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise IntervalError("the checkpoint's intervals are damaged") from None


def width(counts: Sequence[float], truths: Sequence[float], level: float) -> float:
    """The conformal width w of an exit from its counts of held-out pictures and the true ones.

    Raises:
        IntervalError: for a level outside 0 to 1, or too few pictures to promise it.
    """
    return sorted(_scores(counts, truths))[rank(len(counts), level) - 1]


def rank(samples: int, level: float) -> int:
    """Of so many held-out pictures' scores, the smallest first, the number of the one that is the width.

    Raises:
        IntervalError: as of :func:`width`.
    """
    if not 0 < level < 1:
        raise IntervalError(f"a level of {level:g} is no probability between 0 and 1")
    number = math.ceil((samples + 1) * level - _ROUNDING)
    if number > samples:
        least = math.ceil(level / (1 - level) - _ROUNDING)
        raise IntervalError(f"{samples} pictures are too few for a level of {level:g}: it takes {least}")
    return number


def expected_error(counts: Sequence[float], truths: Sequence[float]) -> float:
    """The mean score of an exit, from its counts of held-out pictures and the true ones; one picture at least."""
    return math.fsum(_scores(counts, truths)) / len(counts)


def _scores(counts: Sequence[float], truths: Sequence[float]) -> list[float]:
    return [abs(c - t) / (max(c, 0.0) + ROOM) for c, t in zip(counts, truths, strict=True)]
