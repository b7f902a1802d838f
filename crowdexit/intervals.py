"""Intervals around counts: split-conformal, as wide as the errors of held-out pictures were.

The score of a held-out picture is |ŷ − y| / (ŷ + 10): the error relative to the count itself, so that the interval
of a sparse scene is narrow and that of a dense one wide. With n scores, the ⌈(n + 1)·level⌉-th smallest is the width w
for which [ŷ − w(ŷ + 10), ŷ + w(ŷ + 10)] holds the truth of a further picture of the same kind with probability
``level`` at least (Papadopoulos et al. 2002; Lei et al. 2018), whatever the network. Of pictures of another kind
nothing is promised.
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
        samples: how many held-out pictures it was made of.
    """

    level: float = 0.9
    silent: Mapping[str, float] = field(default_factory=dict)
    heard: Mapping[str, float] = field(default_factory=dict)
    samples: int = 0

    def around(self, exit: str, count: float, *, heard: bool) -> tuple[float, float] | None:
        """(low, high) for a count of this exit; None where it was not calibrated in that state."""
        width = (self.heard if heard else self.silent).get(exit)
        if width is None:
            return None
        half = width * (count + ROOM)
        return max(0.0, count - half), count + half

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for a checkpoint's header."""
        return {
            "level": self.level,
            "silent": dict(self.silent),
            "heard": dict(self.heard),
            "samples": self.samples,
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
            widths = {state: {str(k): float(v) for k, v in data[state].items()} for state in ("silent", "heard")}
            if any(not 0 <= w < math.inf for of_state in widths.values() for w in of_state.values()):
                raise ValueError
            return cls(float(data["level"]), **widths, samples=int(data["samples"]))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise IntervalError("the checkpoint's intervals are damaged") from None


def width(counts: Sequence[float], truths: Sequence[float], level: float) -> float:
    """The conformal width w of an exit from its counts of held-out pictures and the true ones.

    Raises:
        IntervalError: for a level outside 0 to 1, or too few pictures to promise it.
    """
    if not 0 < level < 1:
        raise IntervalError(f"a level of {level:g} is no probability between 0 and 1")
    scores = sorted(abs(c - t) / (max(c, 0.0) + ROOM) for c, t in zip(counts, truths, strict=True))
    rank = math.ceil((len(scores) + 1) * level - _ROUNDING)
    if rank > len(scores):
        least = math.ceil(level / (1 - level) - _ROUNDING)
        raise IntervalError(f"{len(scores)} pictures are too few for a level of {level:g}: it takes {least}")
    return scores[rank - 1]
