"""``auto``: the fastest runtime that agrees, tried once; what fails or disagrees is left out."""

from __future__ import annotations

import json
import logging

import networks
import pytest
import torch

from crowdexit.inference.runtimes import pick as module
from crowdexit.inference.runtimes.arrays import RuntimeUnavailable
from crowdexit.inference.runtimes.base import ReadyChain, Runtime
from crowdexit.inference.runtimes.eager import Eager
from crowdexit.inference.runtimes.kept import cache_folder
from crowdexit.inference.runtimes.pick import Auto


class Fake(Runtime):
    """Eager, wrong by a factor, or failing."""

    def __init__(self, name: str, factor: float = 1.0, error: str = "") -> None:
        self.name, self.factor, self.error = name, factor, error

    def ready(self, network) -> ReadyChain:
        chain = Eager().ready(network)
        chain.runtime = self.name
        ask = chain.ask

        def answer(name, state):
            if self.error:
                raise RuntimeUnavailable(self.error)
            given = ask(name, state)
            return type(given)(given.value * self.factor, given.density)

        chain.ask = answer
        return chain


@pytest.fixture
def network():
    return networks.made("audiocsrnet")


@pytest.fixture
def tried(monkeypatch):
    """Sets rows of fakes with the seconds that each takes; returns the names in the order in which they are tried."""
    order: list[str] = []
    real, timed = module.pick, module._tried

    def set_up(rows: list[list[tuple[Fake, float]]], eager: float = 1.0) -> list[str]:
        fakes = {fake.name: (fake, seconds) for row in rows for fake, seconds in row}
        monkeypatch.setattr(module, "candidates", lambda: tuple(tuple(fake.name for fake, _ in row) for row in rows))
        monkeypatch.setattr(module, "names", lambda: ("auto", "eager", *fakes))
        monkeypatch.setattr(module, "pick", lambda name: fakes[name][0] if name in fakes else real(name))

        def on_a_clock(chain, features):
            order.append(chain.runtime)
            answers, _ = timed(chain, features)
            return answers, fakes[chain.runtime][1] if chain.runtime in fakes else eager

        monkeypatch.setattr(module, "_tried", on_a_clock)
        return order

    return set_up


def test_the_fastest_that_agrees_is_picked_and_remembered(network, tried, caplog):
    order = tried(
        [[(Fake("slow"), 2.0)], [(Fake("wrong", 1.05), 0.1), (Fake("quick", 1.005), 0.2), (Fake("next"), 0.1)]]
    )
    with caplog.at_level(logging.WARNING):
        chain = Auto().ready(network)
    assert chain.runtime == "quick"
    assert order == ["eager", "slow", "wrong", "quick"]
    [line] = caplog.messages
    assert line == "runtime auto: quick, 200 ms a picture here (eager 1000 ms)"
    caplog.clear()
    assert Auto().ready(network).runtime == "quick"
    assert not caplog.messages
    assert len(order) == 4
    # Another network is another question.
    Auto().ready(networks.made("classifier"))
    assert len(order) == 8


def test_what_fails_is_left_out_with_a_warning(network, tried, caplog):
    tried([[(Fake("broken", error="it cannot"), 0.1)], [(Fake("slow"), 2.0)]])
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(network).runtime == "eager"
    assert caplog.messages[0] == "runtime auto leaves out broken: it cannot"


def test_what_was_picked_and_is_gone_is_tried_anew(network, tried, monkeypatch, caplog):
    tried([[(Fake("quick"), 0.1)]])
    assert Auto().ready(network).runtime == "quick"
    gone = module.pick

    def pick(name):
        if name == "quick":
            raise RuntimeUnavailable("quick is not installed")
        return gone(name)

    monkeypatch.setattr(module, "pick", pick)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(network).runtime == "eager"
    assert caplog.messages[0] == "quick is not installed; the runtimes are tried anew"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "\x00" * 100])
def test_a_damaged_memory_is_forgotten(network, tried, text):
    path = cache_folder() / "runtimes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    order = tried([[(Fake("quick"), 0.1)]])
    assert Auto().ready(network).runtime == "quick"
    assert order == ["eager", "quick"]
    assert "quick" in json.loads(path.read_text()).values()


def test_a_memory_that_cannot_be_written_is_no_matter(network, tried, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tried([[(Fake("quick"), 0.1)]])
    assert Auto().ready(network).runtime == "quick"


def test_nothing_is_tried_after_patience_has_run_out(network, tried, monkeypatch):
    order = tried([[(Fake("one"), 0.1)], [(Fake("two"), 0.05)]])
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    assert Auto().ready(network).runtime == "eager"
    assert order == ["eager"]


def test_weights_machine_and_size_make_the_key(network):
    key = module._key(network)
    assert key == module._key(networks.made("audiocsrnet"))
    with torch.no_grad():
        network.final.conv.bias += 1e-3
    assert module._key(network) != key


def test_for_real(network, monkeypatch, tmp_path):
    """On this machine, with what is installed: it answers as eager does."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chain = Auto().ready(network)
    features = networks.batch(network, 1)
    expected = dict(Eager().ready(network).stream(features))
    for name, answer in chain.stream(features):
        torch.testing.assert_close(answer.value, expected[name].value, rtol=0.02, atol=0.5)
    assert len(list(tmp_path.rglob("runtimes.json"))) == 1
