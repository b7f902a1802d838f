"""Work that is called off ends between two layers, and disturbs nobody after it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import Exit, ExitOutput, Features, Stage, inputs
from crowdexit.runtimes import onnx, openvino
from crowdexit.runtimes.arrays import Signature, TensorSpec
from crowdexit.runtimes.cancel import Cancelled, CancelToken, cancelled_by, check, may_be_cancelled
from crowdexit.runtimes.eager import EagerChain
from crowdexit.runtimes.engines import Engine, OnnxEngine, OpenVINOEngine
from crowdexit.runtimes.subgraphs import Subgraph

LAYERS, SIDE = 24, 128  # a good part of a second of work, of which a layer is some ten milliseconds


class Deep(Stage):
    """Many layers; counts those that have run."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 31, padding=15)
        self.conv.weight.data /= 10
        self.ran = 0

    def forward(self, features: Features) -> Features:
        visual = features.visual
        for _ in range(LAYERS):
            visual = torch.tanh(self.conv(visual))
            self.ran += 1
        return features.with_visual(visual)


class Mean(Exit):
    kind = "mean"

    def forward(self, features: Features) -> ExitOutput:
        return ExitOutput(features.visual.mean((1, 2, 3)))


def called_off(work: Callable[[], object], running: threading.Event) -> BaseException | None:
    """What comes of work in another thread that is called off soon after it has begun to run."""
    cancel_token, came = CancelToken(), list[BaseException | None]()

    def run() -> None:
        try:
            with cancel_token.working():
                work()
            came.append(None)
        except BaseException as error:
            came.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert running.wait(60)
    time.sleep(0.02)
    cancel_token()
    thread.join(60)
    assert not thread.is_alive()
    return came[0]


def test_eager_ends_between_two_layers():
    stage = Deep()
    network = MultiExitNetwork([stage], Mean(), {}, None).eval()  # type: ignore[arg-type]
    chain = EagerChain(network, "eager", torch.device("cpu"), None)
    state = chain.begin(inputs(torch.ones(1, 3, SIDE, SIDE)))
    running = threading.Event()
    stage.register_forward_pre_hook(lambda *_: running.set())
    assert isinstance(called_off(lambda: chain.advance(0, state), running), Cancelled)
    assert stage.ran < LAYERS
    stage.ran = 0
    whole = chain.run_exit("final", chain.advance(0, state)).value
    assert stage.ran == LAYERS
    assert torch.isfinite(whole).all()


class Noted(OpenVINOEngine):
    """Tells when it runs."""

    running: threading.Event

    def _run(self, ready: Any, arrays: Any) -> Any:
        self.running.set()
        return super()._run(ready, arrays)


class NotedOnnx(OnnxEngine):
    running: threading.Event

    def _run(self, ready: Any, arrays: Any) -> Any:
        self.running.set()
        return super()._run(ready, arrays)


@pytest.mark.parametrize(("convert", "kind"), [(openvino.convert, Noted), (onnx.convert, NotedOnnx)])
def test_engines_end_between_two_layers(convert, kind):
    shape = (3, SIDE, SIDE)
    spec = TensorSpec("visual", "float32", shape)
    subgraph = Subgraph(Deep().eval(), Signature((spec,), (spec,)), None, None)
    model = convert(subgraph)
    engine: Engine = kind(lambda *_: model if isinstance(model, bytes) else model.clone())
    engine.prepare("stage-0", (shape,))
    images = np.random.default_rng(0).normal(size=(2, 1, *shape)).astype(np.float32)

    def run(at: int) -> np.ndarray:
        return engine.run("stage-0", [images[at]])[0]

    engine.running = threading.Event()  # type: ignore[attr-defined]
    before = run(1)
    engine.running.clear()  # type: ignore[attr-defined]
    assert isinstance(called_off(lambda: run(0), engine.running), Cancelled)  # type: ignore[attr-defined]
    # Who comes next gets his own answer, and nobody has called that off.
    np.testing.assert_array_equal(run(1), before)
    late = CancelToken()
    late()
    with pytest.raises(Cancelled), late.working():
        run(0)


def test_nothing_but_that_work_is_called_off():
    first, second = CancelToken(), CancelToken()
    broken: list[str] = []
    with first.working(), cancelled_by(lambda: broken.append("first")):
        assert may_be_cancelled()
        first()
    assert broken == ["first"]
    with second.working():
        first()  # once more, when another's work runs
        check()
        with pytest.raises(ZeroDivisionError), cancelled_by(lambda: broken.append("second")):
            raise ZeroDivisionError  # an error of its own stays one
    assert broken == ["first"]
    assert not may_be_cancelled()
    check()
    with cancelled_by(lambda: broken.append("nobody's")):
        pass
    with first.working(), pytest.raises(Cancelled):
        check()


def test_what_breaks_since_it_was_called_off_is_no_error_of_its_own():
    work = CancelToken()

    def cancelled() -> None:
        with cancelled_by(lambda: None):
            work()
            raise RuntimeError("Infer Request was canceled")

    with work.working(), pytest.raises(Cancelled):
        cancelled()
