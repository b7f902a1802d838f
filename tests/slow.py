"""A counter whose stages take as long as they are told to, and that says which of them ran."""

from __future__ import annotations

import time
from copy import deepcopy

from crowdexit.calibration.intervals import Intervals
from crowdexit.inference.counter import CrowdCounter
from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes.base import ReadyChain
from crowdexit.runtimes.eager import Eager


class SlowChain(ReadyChain):
    """Of a copy of the network: a stage that runs on after its test disturbs nobody.

    Attributes: seconds of each stage, and whether for each row; every step in the order it ended, ``0`` … or an exit's
    name; what breaks.
    """

    def __init__(self, network: MultiExitNetwork, seconds: list[float], *, a_row: bool = False) -> None:
        super().__init__(network, "slow")
        self.inner = Eager().ready(deepcopy(network))
        self.seconds, self.a_row, self.ran = seconds, a_row, list[int | str]()
        self.breaks: Exception | None = None

    def begin(self, features):
        return self.inner.begin(features)

    def advance(self, index, state):
        time.sleep(self.seconds[index] * (len(state.visual) if self.a_row else 1))
        if self.breaks is not None:
            raise self.breaks
        state = self.inner.advance(index, state)
        self.ran.append(index)
        return state

    def run_exit(self, name, state):
        answer = self.inner.run_exit(name, state)
        self.ran.append(name)
        return answer

    def select(self, state, keep):
        return self.inner.select(state, keep)

    def visual_of(self, state):
        return self.inner.visual_of(state)


class Slow:
    name = "slow"

    def __init__(self, seconds: list[float], a_row: bool) -> None:
        self.seconds, self.a_row = seconds, a_row

    def ready(self, network: MultiExitNetwork) -> SlowChain:
        return SlowChain(network, self.seconds, a_row=self.a_row)


def slow(
    network: MultiExitNetwork, *seconds: float, intervals: Intervals | None = None, a_row: bool = False
) -> CrowdCounter:
    """A counter with so many seconds for each of the four stages, or for each row there."""
    return CrowdCounter(network, "slow", runtime=Slow(list(seconds), a_row), intervals=intervals)
