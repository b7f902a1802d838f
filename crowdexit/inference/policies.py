"""The policies (:class:`crowdexit.inference.executor.Policy`) that decide which exits run and which samples leave."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from crowdexit.errors import CrowdExitError
from crowdexit.inference.executor import Mask, Part, Policy, StageExecutor

_TRUSTED = 16  # measurements from which on the shortest of them is believed to be about the least there is


class PolicyError(CrowdExitError):
    """A policy that can never be met, or that goes with nothing."""


@dataclass(frozen=True)
class Anytime:
    """Ask every exit and go on until the end or the deadline.

    Once there is an answer, a stage that could not end in time, however fast, is not begun: it would be in vain, and
    the next request would have to wait until it is broken off.
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
    """Ask one exit only, the deepest whose answer comes by the deadline as far as the profile tells.

    Nothing is computed in vain; in return there is nothing to fall back to if a stage takes longer than ever. Decided
    anew at every exit, from the time that is left by then.

    Attributes:
        sure: how often each step is to keep within the time that is reckoned for it.

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
    """A sample is asked about by one exit after the other, and leaves with the first answer that is sure enough.

    Attributes:
        uncertainty: its bound: of counts the half-width of the interval in people; of classes 1 − confidence or
            the entropy, whichever is reckoned.
        share: of counts, the bound as a share of the count as well; the wider of the two bounds holds.

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
    """A policy as a command line names it.

    Args:
        name: ``anytime``, ``fits`` or ``confident``.
        within: for ``confident``, how far the interval may reach from the count: people (``15``) or a share of it
            (``50%``, the default).

    Raises:
        PolicyError: for another name, a bound that means nothing, or one where none belongs.
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
