"""The policies (:class:`crowdexit.inference.executor.Policy`) that decide which exits run and which samples leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crowdexit.errors import CrowdExitError
from crowdexit.inference.executor import Mask, Part, Policy, StageExecutor

_TRUSTED = 16  # number of measurements whose minimum is trusted as a lower bound


class PolicyError(CrowdExitError):
    """An invalid policy."""


@dataclass(frozen=True)
class Anytime:
    """Run every exit until the end or the deadline.

    After the first result, a stage that cannot finish in time is not started, as it would only delay the next request.
    """

    def should_run_exit(self, exit: str, part: Part, executor: StageExecutor) -> bool:
        return True

    def keep_at_stage(self, exit: str, part: Part, executor: StageExecutor) -> Mask:
        return np.ones(len(part.samples), np.bool_)

    def keep_for_stage(self, stage: int, part: Part, executor: StageExecutor) -> Mask:
        everyone = np.ones(len(part.samples), np.bool_)
        if not executor.answered[part.samples].all():
            return everyone
        fastest = executor.needed_ms(stage, None, part, quantile=0, min_samples=_TRUSTED)
        return everyone & (fastest is None or fastest <= executor.left_ms())


@dataclass(frozen=True)
class DeepestThatFits:
    """Run one exit only: the deepest that is predicted to meet the deadline.

    No other exit is computed, so there is no fallback if a stage is unusually slow. The prediction is updated at every
    exit from the time left.

    Attributes:
        sure: quantile of the measured latency used for each step.

    Examples:
        >>> import crowdexit
        >>> counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
        >>> counter.count("street.jpg", deadline_ms=60_000, policy=DeepestThatFits()).chosen.exit
        'final'
    """

    sure: float = 0.95

    def should_run_exit(self, exit: str, part: Part, executor: StageExecutor) -> bool:
        at = executor.exits.index(exit)
        left, here = executor.left_ms(), executor.chain.stage_of(exit)
        for deeper in reversed(executor.exits[at + 1 :]):
            needed = executor.needed_ms(here + 1, deeper, part, quantile=self.sure)
            if needed is not None and needed <= left:
                return False
        return True

    def keep_at_stage(self, exit: str, part: Part, executor: StageExecutor) -> Mask:
        return ~executor.answered[part.samples]

    def keep_for_stage(self, stage: int, part: Part, executor: StageExecutor) -> Mask:
        return ~executor.answered[part.samples]


@dataclass(frozen=True)
class Confident:
    """Run the exits one after the other; a sample exits at the first result that is confident enough.

    Attributes:
        uncertainty: its bound: for counts the half-width of the interval in people; for classes 1 − confidence or
            the entropy, whichever is used.
        share: for counts, a bound as a share of the count; the wider of the two applies.

    Raises:
        PolicyError: if neither bound is above zero.

    Examples:
        >>> import crowdexit
        >>> counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
        >>> counter.count("street.jpg", policy=Confident(share=0.4)).chosen.exit
        'V1'
    """

    uncertainty: float = 0.0
    share: float = 0.0

    def __post_init__(self) -> None:
        if not (self.uncertainty > 0 or self.share > 0):
            raise PolicyError("the bound for the interval must be positive")

    def should_run_exit(self, exit: str, part: Part, executor: StageExecutor) -> bool:
        return True

    def keep_at_stage(self, exit: str, part: Part, executor: StageExecutor) -> Mask:
        return self._unsure(part, executor)

    def keep_for_stage(self, stage: int, part: Part, executor: StageExecutor) -> Mask:
        return self._unsure(part, executor)

    def _unsure(self, part: Part, executor: StageExecutor) -> Mask:
        bound = np.maximum(self.uncertainty, self.share * executor.counts[part.samples])
        kept: Mask = ~(executor.uncertainties[part.samples] <= bound)
        return kept


ANYTIME = Anytime()


def policy_named(name: str, within: str | None = None) -> Policy:
    """Parse a policy from text.

    Args:
        name: ``anytime``, ``fits`` or ``confident``.
        within: for ``confident``, how far the interval may reach from the count: people (``15``) or a share of it
            (``50%``, the default).

    Raises:
        PolicyError: for an unknown name, an invalid bound, or a bound for a policy without one.
    """
    if name not in ("anytime", "fits", "confident"):
        raise PolicyError(f"no policy {name!r} (there are anytime, fits and confident)")
    if name != "confident":
        if within is not None:
            raise PolicyError(f"a bound ({within}) is for the policy confident, not for {name}")
        return ANYTIME if name == "anytime" else DeepestThatFits()
    number, percent, rest = ("50%" if within is None else within).partition("%")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if rest or not 0 < bound < math.inf:
        raise PolicyError(f"bad bound {within!r}; use people (15) or a share of the count (50%)")
    return Confident(share=bound / 100) if percent else Confident(bound)
