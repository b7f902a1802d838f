"""A counter whose stages take as long as they are told to, and that says which of them ran."""

from __future__ import annotations

import time

from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.runtimes.base import ReadyChain
from crowdexit.inference.runtimes.eager import Eager
from crowdexit.intervals import Intervals
from crowdexit.network import MultiExitNetwork


class SlowChain(ReadyChain):
    """Attributes: seconds of each stage; every step in the order it ended, ``0`` … or an exit's name; what breaks."""

    def __init__(self, network: MultiExitNetwork, seconds: list[float]) -> None:
        super().__init__(network, "slow")
        self.inner = Eager().ready(network)
        self.seconds, self.ran = seconds, list[int | str]()
        self.breaks: Exception | None = None

    def begin(self, features):
        return self.inner.begin(features)

    def advance(self, index, state):
        time.sleep(self.seconds[index])
        if self.breaks is not None:
            raise self.breaks
        state = self.inner.advance(index, state)
        self.ran.append(index)
        return state

    def ask(self, name, state):
        answer = self.inner.ask(name, state)
        self.ran.append(name)
        return answer

    def select(self, state, keep):
        return self.inner.select(state, keep)


class Slow:
    name = "slow"

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def ready(self, network: MultiExitNetwork) -> SlowChain:
        return SlowChain(network, self.seconds)


def slow(network: MultiExitNetwork, *seconds: float, intervals: Intervals | None = None) -> CrowdCounter:
    """A counter with so many seconds for each of the four stages."""
    return CrowdCounter(network, "slow", runtime=Slow(list(seconds)), intervals=intervals)
