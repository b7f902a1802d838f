"""A runtime is added by its own file."""

from __future__ import annotations

import pytest
from tiny import tiny_counter

from crowdexit.data.image import decode_pixels
from crowdexit.inference.counter import CrowdCounter
from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes import base
from crowdexit.runtimes.base import ReadyChain, Runtime, register_runtime
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.selection import automatic_names, names, select_runtime


@pytest.fixture
def abacus(monkeypatch):
    """A runtime that is called ``abacus``, and one that is called ``abacus-fast``."""
    assert names()  # all others are registered before
    monkeypatch.setattr(base, "_RUNTIMES", dict(base.registered_runtimes()))

    @register_runtime("abacus", "abacus-fast")
    class Abacus(Runtime):
        automatic = True

        def __init__(self, name: str = "abacus") -> None:
            self.name = name

        @classmethod
        def candidates(cls, network: MultiExitNetwork) -> tuple[str, ...]:
            return ("abacus-fast", "abacus")

        def ready(self, network: MultiExitNetwork) -> ReadyChain:
            chain = Eager().ready(network)
            chain.runtime = self.name
            return chain


@pytest.mark.usefixtures("abacus")
def test_a_runtime_is_known_by_its_names(crowd_image):
    assert {"abacus", "abacus-fast"} <= set(names()) & set(automatic_names())
    network = tiny_counter().network
    counter = CrowdCounter(network, "tiny", runtime=select_runtime("abacus-fast"))
    assert counter.chain.runtime == "abacus-fast"
    image = decode_pixels(crowd_image()[0])
    assert counter.count(image).count == CrowdCounter(network, "tiny", runtime=Eager()).count(image).count


def test_what_the_runtimes_can_do():
    kinds = base.registered_runtimes()
    assert {name for name in names()[1:] if not kinds[name].automatic} == {"compile", "compile-bf16"}
    assert {kind.__name__ for kind in kinds.values() if kind.runs_network} == {"Eager", "Winograd"}
