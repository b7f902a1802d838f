"""``auto``: the fastest runtime that agrees, tried once; what fails or disagrees is left out."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace

import networks
import numpy as np
import pytest
import torch

from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.models import open_model
from crowdexit.models import zoo
from crowdexit.models.network import ActivationRange
from crowdexit.runtimes import selection as module
from crowdexit.runtimes.arrays import RuntimeUnavailable
from crowdexit.runtimes.base import ReadyChain, Runtime
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.model_cache import save_choice
from crowdexit.runtimes.onnx import Onnx
from crowdexit.runtimes.selection import Auto, candidates, names
from crowdexit.utils.machine import cache_folder


class Fake(Runtime):
    """Eager, wrong by a factor; ``breaks`` names the steps that fail, of ``prepare``, ``begin``, ``advance 0`` …,
    ``run_exit V1`` …, ``select``."""

    def __init__(self, name: str, factor: float = 1.0, error: Exception | None = None, breaks: str = "ask AV1") -> None:
        self.name, self.factor, self.error, self.breaks = name, factor, error, breaks

    def ready(self, network) -> ReadyChain:
        return FakeChain(network, self)


class FakeChain(ReadyChain):
    def __init__(self, network, fake: Fake) -> None:
        super().__init__(network, fake.name)
        self.fake, self.inner = fake, Eager().ready(network)

    def _step(self, name: str) -> None:
        if self.fake.error is not None and name == self.fake.breaks:
            raise self.fake.error

    def prepare(self, exits, size=None):
        self._step("prepare")

    def begin(self, features):
        self._step("begin")
        return self.fake, self.inner.begin(features)

    def advance(self, index, state):
        self._step(f"advance {index}")
        return self._own(state, self.inner.advance(index, state[1]))

    def run_exit(self, name, state):
        self._step(f"ask {name}")
        given = self.inner.run_exit(name, self._own(state, state[1])[1])
        return type(given)(given.value * self.fake.factor, given.density)

    def select(self, state, keep):
        self._step("select")
        return self._own(state, self.inner.select(state[1], keep))

    def visual_of(self, state):
        return self.inner.visual_of(state[1])

    def _own(self, state, inner):
        """A state goes on on the runtime that began it."""
        assert state[0] is self.fake
        return self.fake, inner


@pytest.fixture
def network():
    return networks.made("audiocsrnet")


@pytest.fixture
def tried(monkeypatch):
    """Sets rows of fakes with the seconds that each takes; returns the names in the order in which they are tried."""
    order: list[str] = []
    real, answers = module.select_runtime, module._answers

    def set_up(rows: list[list[tuple[Fake, float]]], eager: float = 1.0) -> list[str]:
        fakes = {fake.name: (fake, seconds) for row in rows for fake, seconds in row}
        monkeypatch.setattr(module, "candidates", lambda _: tuple(tuple(fake.name for fake, _ in row) for row in rows))
        monkeypatch.setattr(module, "automatic_names", lambda: ("eager", *fakes))
        monkeypatch.setattr(module, "select_runtime", lambda name: fakes[name][0] if name in fakes else real(name))

        def in_order(chain, features):
            order.append(chain.runtime)
            return answers(chain, features)

        def on_a_clock(chain, features):
            return fakes[chain.runtime][1] if chain.runtime in fakes else eager

        monkeypatch.setattr(module, "_answers", in_order)
        monkeypatch.setattr(module, "_seconds", on_a_clock)
        return order

    return set_up


def test_fastest_agreeing_runtime_is_selected_and_cached(network, tried, caplog):
    order = tried(
        [[(Fake("slow"), 2.0)], [(Fake("wrong", 1.05), 0.1), (Fake("quick", 1.005), 0.2), (Fake("next"), 0.1)]]
    )
    with caplog.at_level(logging.WARNING):
        chain = Auto().ready(network)
    assert chain.runtime == "quick"
    assert order == ["eager", "slow", "wrong", "quick"]
    [line] = caplog.messages
    assert line == "runtime auto: quick, 200 ms an image here (eager 1000 ms)"
    caplog.clear()
    assert Auto().ready(network).runtime == "quick"
    assert not caplog.messages
    assert len(order) == 4
    # Another network is another question.
    Auto().ready(networks.made("classifier"))
    assert len(order) == 8


@pytest.mark.parametrize(
    "error",
    [RuntimeUnavailable("it cannot"), torch.OutOfMemoryError("it cannot"), RuntimeError("a check failed\nit cannot")],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_is_left_out_with_a_warning(error, network, tried, caplog):
    tried([[(Fake("broken", error=error), 0.1)], [(Fake("slow"), 2.0)]])
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(network).runtime == "eager"
    assert caplog.messages[0] == "runtime auto skips broken: it cannot"


BREAKS = ["prepare", "begin", *(f"advance {index}" for index in range(4)), "ask V1", "ask final", "select"]


@pytest.mark.parametrize("breaks", BREAKS)
@pytest.mark.parametrize("remembered", [False, True], ids=["new", "remembered"])
@pytest.mark.parametrize("kind", [RuntimeUnavailable, RuntimeError], ids=lambda kind: kind.__name__)
def test_eager_takes_over_when_the_selected_runtime_fails(breaks, remembered, kind, network, tried, caplog):
    """In the middle of a walk too, with the samples that are left; said once, and never picked again by memory."""
    fake = Fake("quick", breaks=breaks)
    tried([[(fake, 0.1)]])
    chains = [Auto().ready(network) for _ in range(1 + remembered)]
    features, other = networks.batch(network, 4), networks.batch(network, 3, seed=1)
    expected = dict(Eager().ready(network).stream(features))
    chain = chains[-1]
    under_way = chain.advance(0, chain.begin(other))
    fake.error = kind("there is no more memory")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        chain.prepare(["V1", "final"])
        state = chain.begin(features)
        for index, keep in enumerate((torch.tensor([True, False, True, True]), torch.tensor([2, 0]))):
            state = chain.advance(index, state)
            if index == 0:
                torch.testing.assert_close(chain.run_exit("V1", state).value, expected["V1"].value)
            state = chain.select(state, keep)
        answer = chain.run_exit("final", chain.advance(3, chain.advance(2, state)))
    torch.testing.assert_close(answer.value, expected["final"].value[[3, 0]])
    torch.testing.assert_close(answer.density, expected["final"].density[[3, 0]])
    assert caplog.messages == ["runtime auto: there is no more memory; falling back to eager"]
    assert chain.runtime == "eager"
    assert json.loads((cache_folder() / "runtimes.json").read_text()) == {}
    # What was under way meanwhile comes to its end, too, and says nothing more.
    wanted = dict(Eager().ready(network).stream(other, ["final"]))["final"].value
    for index in (1, 2, 3):
        under_way = chain.advance(index, under_way)
    torch.testing.assert_close(chain.run_exit("final", under_way).value, wanted)
    assert len(caplog.messages) == 1


def test_a_counter_on_what_fails_counts_on_eager(network, tried, caplog):
    fake = Fake("quick", breaks="prepare")
    tried([[(fake, 0.1)]])
    Auto().ready(network)
    fake.error = RuntimeUnavailable("no compiler")
    image = np.random.default_rng(0).integers(0, 255, (64, 128, 3), np.uint8)
    said = list(CrowdCounter(network, "tiny", runtime=Auto()).stream(image))
    assert [e.count for e in said] == [e.count for e in CrowdCounter(network, "tiny", runtime=Eager()).stream(image)]
    with pytest.raises(RuntimeUnavailable, match=r"^no compiler$"):  # of a runtime that was named
        CrowdCounter(network, "tiny", runtime=fake)


def test_onnx_is_tried_only_where_int8_does_not_agree(network, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "has_bfloat16", lambda: False)
    monkeypatch.setattr(module, "installed_version", lambda name: "9")
    monkeypatch.setattr(module, "multiplies_bf16", lambda: False)
    network.activation_ranges = {"stages.0": ActivationRange(0.0, 1.0, 255, ())}
    assert candidates(network)[-2:] == (("openvino",), ("openvino-int8", "onnx"))


@pytest.mark.parametrize(
    ("cuda", "bf16", "wide", "libraries", "openvino_bf16", "expected"),
    [
        (True, True, True, ("openvino", "onnxruntime"), True, (("cuda-half",), ("cuda-bf16",), ("cuda",))),
        (False, True, True, ("openvino", "onnxruntime"), True, (("eager-bf16",), ("openvino-bf16", "openvino"))),
        (False, False, False, ("openvino",), False, (("openvino",),)),
        (False, False, False, ("openvino", "onnxruntime"), False, (("openvino",), ("onnx",))),
        (False, False, True, ("onnxruntime",), None, (("winograd",), ("onnx",))),
        (False, True, True, (), None, (("eager-bf16",),)),
        (False, False, False, (), None, ()),
        # Its metadata are there, and it cannot be imported.
        (False, True, True, ("openvino",), None, (("eager-bf16",),)),
        (False, False, False, ("openvino", "onnxruntime"), None, (("onnx",),)),
    ],
)
def test_candidates(cuda, bf16, wide, libraries, openvino_bf16, expected, network, monkeypatch, caplog):
    def multiplies_bf16() -> bool:
        if openvino_bf16 is None:
            raise RuntimeUnavailable("openvino cannot be imported: libtbb.so.12")
        return openvino_bf16

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(module, "has_bfloat16", lambda: bf16)
    monkeypatch.setattr(torch.backends.nnpack, "is_available", lambda: True)
    monkeypatch.setattr(module, "installed_version", lambda name: "9" if name in libraries else None)
    monkeypatch.setattr(module, "multiplies_bf16", multiplies_bf16)
    if wide:  # enough for minimal filtering
        network.wide = torch.nn.Conv2d(128, 128, 3, padding=1)
    with caplog.at_level(logging.WARNING):
        assert candidates(network) == expected
    assert {name for row in expected for name in row} <= set(module.automatic_names()) <= set(names())
    broken = "openvino" in libraries and openvino_bf16 is None
    said = "runtime auto skips openvino: openvino cannot be imported: libtbb.so.12"
    assert caplog.messages == ([said] if broken else [])


@pytest.mark.parametrize("name", ["auto", "compile", "openvino-int8", "abacus"])
def test_only_choices_of_auto_are_cached(name, network, tried):
    """Whatever else stands in the file, ``auto`` itself above all, would be picked for ever."""
    order = tried([[(Fake("quick"), 0.1)]])
    save_choice(module._key(network), name)
    assert Auto().ready(network).runtime == "quick"
    assert order == ["eager", "quick"]


def test_missing_cached_runtime_is_selected_again(network, tried, monkeypatch, caplog):
    tried([[(Fake("quick"), 0.1)]])
    assert Auto().ready(network).runtime == "quick"
    gone = module.select_runtime

    def select_runtime(name):
        if name == "quick":
            raise RuntimeUnavailable("quick is not installed")
        return gone(name)

    monkeypatch.setattr(module, "select_runtime", select_runtime)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(network).runtime == "eager"
    assert caplog.messages[0] == "quick is not installed; selecting a runtime again"


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


def test_nothing_is_tried_after_patience_has_run_out(network, tried, monkeypatch, caplog):
    order = tried([[(Fake("one"), 0.1)], [(Fake("two"), 0.05)]])
    monkeypatch.setattr(module, "PATIENCE_S", 0.0)
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(network).runtime == "eager"
    assert order == ["eager"]
    left_out = [f"runtime auto skips {name}: trying the others took too long" for name in ("one", "two")]
    assert caplog.messages[:-1] == left_out
    monkeypatch.setattr(module, "PATIENCE_S", 3600.0)
    assert Auto().ready(network).runtime == "two"  # nothing was remembered of the hurry


def test_a_machine_that_changes_its_pace_does_not_choose(network, tried, monkeypatch):
    """It is three times as fast while the first rounds last; every one of those tried has its share of that."""
    tried([[(Fake("quick"), 0.5)], [(Fake("slow"), 0.7)]])
    on_a_clock, asked = module._seconds, []

    def slower_by_and_by(chain, features):
        asked.append(chain.runtime)
        return on_a_clock(chain, features) * (1 if len(asked) <= 4 else 3)

    monkeypatch.setattr(module, "_seconds", slower_by_and_by)
    assert Auto().ready(network).runtime == "quick"
    assert asked == ["eager", "quick", "slow"] * module.PROBES


def test_what_fails_while_it_is_timed_is_left_out(network, tried, monkeypatch, caplog):
    tried([[(Fake("quick"), 0.1)], [(Fake("slow"), 0.5)]])
    on_a_clock, asked = module._seconds, []

    def for_a_while(chain, features):
        asked.append(chain.runtime)
        if chain.runtime == "quick" and asked.count("quick") == 2:
            raise RuntimeUnavailable("there is no more memory")
        return on_a_clock(chain, features)

    monkeypatch.setattr(module, "_seconds", for_a_while)
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(network).runtime == "slow"
    assert caplog.messages[0] == "runtime auto skips quick: there is no more memory"


@pytest.mark.parametrize(("long", "timed"), [(3600.0, module.PROBES), (1e-9, 1)])
def test_what_takes_long_is_not_timed_as_often(long, timed, network, monkeypatch):
    monkeypatch.setattr(module, "LONG_S", long)
    asked: list[str] = []
    monkeypatch.setattr(module, "_seconds", lambda chain, _: asked.append(chain.runtime) or 1.0)
    chain = Eager().ready(network)
    module._in_turn(network, {"eager": chain}, networks.batch(network, 1))
    assert asked == ["eager"] * timed


def test_weights_machine_and_size_make_the_key(network, monkeypatch):
    key = module._key(network)
    assert key == module._key(networks.made("audiocsrnet"))
    spec = networks.SPECS["audiocsrnet"]
    bare = [zoo.with_exits(network, spec, [])]
    bare.append(zoo.at_size(*bare[0], (192, 128)))
    keys = [key, *(module._key(of_size) for of_size, _ in bare)]
    for where, what, other in (
        (module, "processor", lambda: ("another", "amx_tile")),
        (os, "cpu_count", lambda: 1000),
        (torch, "get_num_threads", lambda: 1000),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(where, what, other)
            keys.append(module._key(network))
    with torch.no_grad():
        network.final.conv.bias += 1e-3
    keys.append(module._key(network))
    assert len(set(keys)) == len(keys) == 7


def test_a_gpu_that_cannot_be_used_is_no_matter(network, monkeypatch, caplog):
    """One that is full fails as soon as anybody wants anything of it."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "candidates", candidates)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", full)
    to = type(network).to

    def moved(self, *where, **how):
        return full() if torch.device("cuda") in where else to(self, *where, **how)

    monkeypatch.setattr(type(network), "to", moved)
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(network).runtime == "eager"
    assert caplog.messages[:-1] == [
        f"runtime auto skips {name}: the GPU cannot run it: CUDA out of memory"
        for name in ("cuda-half", "cuda-bf16", "cuda")
    ]


def test_for_real(network, monkeypatch):
    """On this machine, with what is installed: where eager is slow another is picked, and answers as eager does."""
    timed = module._seconds

    def with_slow_eager(chain, features):
        return timed(chain, features) + 3600 * (chain.runtime == "eager")

    monkeypatch.setattr(module, "candidates", candidates)
    monkeypatch.setattr(module, "PATIENCE_S", 3600.0)
    monkeypatch.setattr(module, "_seconds", with_slow_eager)
    chain = Auto().ready(network)
    assert chain.runtime in {name for row in candidates(network) for name in row}
    monkeypatch.setattr(module, "_answers", lambda *_: 1 / 0)
    again = Auto().ready(network)
    assert again.runtime == chain.runtime
    features = networks.batch(network, 1)
    said = [dict(selected.stream(features)) for selected in (chain, again)]
    expected = dict(Eager().ready(network).stream(features))
    for answers in said:
        for name, answer in answers.items():
            torch.testing.assert_close(answer.value, expected[name].value, rtol=0.02, atol=0.5)


@pytest.fixture(scope="module")
def shipped():
    """The default network as it is opened, with its own ranges."""
    network, _, _ = open_model("audiocsrnet-lite", "eager")
    return network


def test_auto_takes_int8_that_agrees(shipped, monkeypatch):
    """The shipped ranges, by the samples that auto compares on, at every exit."""
    monkeypatch.setattr(module, "candidates", lambda _: (("openvino-int8",),))
    seconds = {"eager": 1.0, "openvino-int8": 0.5}
    monkeypatch.setattr(module, "_seconds", lambda chain, _: seconds[chain.runtime])
    assert Auto().ready(shipped).runtime == "openvino-int8"
    assert Auto().ready(shipped).runtime == "openvino-int8"  # remembered


def test_auto_refuses_int8_that_disagrees(shipped, monkeypatch, caplog):
    broken = {name: replace(found, high=0.3 * found.high) for name, found in shipped.activation_ranges.items()}
    monkeypatch.setattr(shipped, "activation_ranges", broken)
    monkeypatch.setattr(module, "candidates", lambda _: (("openvino-int8",),))
    with caplog.at_level(logging.WARNING):
        assert Auto().ready(shipped).runtime == "eager"
    assert caplog.messages[0].startswith("runtime auto skips openvino-int8: exit V0 differs by ")


def test_int8_is_tried_where_there_are_ranges(network):
    assert "openvino-int8" not in {name for row in candidates(network) for name in row}
    network.activation_ranges = {"stages.0": ActivationRange(0.0, 1.0)}
    assert ("openvino-int8" in {name for row in candidates(network) for name in row}) != torch.cuda.is_available()


def test_a_runtime_of_somebody_else_is_tried_too(network, monkeypatch):
    monkeypatch.setattr(Onnx, "candidates", classmethod(lambda cls, network: ("onnx-fast", "onnx")))
    assert candidates(network)[-1] == ("onnx-fast", "onnx")
