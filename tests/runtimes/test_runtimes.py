"""Every runtime answers as eager PyTorch in float32 does, whatever the network, the sounds and the batch."""

from __future__ import annotations

import functools
import gc
import logging
import subprocess
import sys
import weakref
from dataclasses import fields

import networks
import numpy as np
import pytest
import torch

from crowdexit.inference.counter import CrowdCounter
from crowdexit.models.network import ActivationRange, MultiExitNetwork
from crowdexit.models.stages import ExitOutput, Features, inputs
from crowdexit.runtimes import compiled, engines, openvino
from crowdexit.runtimes.arrays import FEATURE_FIELDS, OUTPUT_FIELDS, ArrayChain, RuntimeUnavailable
from crowdexit.runtimes.base import ReadyChain
from crowdexit.runtimes.eager import Eager, _on
from crowdexit.runtimes.int8 import measure_ranges, quantised
from crowdexit.runtimes.onnx import Onnx
from crowdexit.runtimes.openvino import OpenVINO
from crowdexit.runtimes.selection import names, select_runtime
from crowdexit.runtimes.subgraphs import partition

CUDA = torch.device("cuda")
EXACT = {"rtol": 1e-5, "atol": 1e-4}


def same(chain: ReadyChain, features: Features, expected: dict, **tolerance: float) -> None:
    """Every exit answers, in order, in float32, with the expected values and maps."""
    answers = dict(chain.stream(features))
    assert list(answers) == list(expected)
    for name, answer in answers.items():
        for given, wanted in ((answer.value, expected[name].value), (answer.density, expected[name].density)):
            if wanted is None:
                assert given is None
            else:
                torch.testing.assert_close(given, wanted, **(tolerance or EXACT))


def near(chain: ReadyChain, features: Features, expected: dict, share: float) -> None:
    """Every exit answers within a share of its largest expected answer."""
    for name, answer in chain.stream(features):
        wanted = expected[name].value
        assert float((answer.value - wanted).abs().max()) <= share * float(wanted.abs().max()), name


def on_eager(network: MultiExitNetwork, features: Features) -> dict:
    return dict(Eager().ready(network).stream(features))


@pytest.mark.parametrize("kind", networks.SPECS)
def test_openvino_answers_as_eager_does(kind):
    """Half of the batch is heard, and what stands in the rows of the rest is not a number."""
    network = networks.made(kind)
    chain = OpenVINO().ready(network)
    for length in (3, 1):
        features = networks.batch(network, length, seed=length)
        same(chain, features, on_eager(network, features))


def test_openvino_runs_every_kind_of_branch():
    network = networks.every_branch()
    features = networks.batch(network, 2)
    same(OpenVINO().ready(network), features, on_eager(network, features))


@pytest.mark.parametrize(
    "kind",
    ["classifier", pytest.param("audiocsrnet", marks=pytest.mark.slow), pytest.param("all", marks=pytest.mark.slow)],
)
def test_onnx_answers_as_eager_does(kind):
    network = networks.every_branch() if kind == "all" else networks.made(kind)
    chain = Onnx().ready(network)
    for length in (3, 1):
        features = networks.batch(network, length, seed=length)
        same(chain, features, on_eager(network, features))


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_pieces_answer_as_eager_does(compiler, monkeypatch):
    """Dynamo takes every piece as one graph, and from the second size on one for all batches."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler, fullgraph=True))
    network = networks.made("transcrowd-fit")
    chain = compiled.Compiled().ready(network)
    for length in (2, 3, 4):
        features = networks.batch(network, length, seed=length)
        same(chain, features, on_eager(network, features))


@pytest.mark.parametrize("name", ["eager-bf16", "openvino-bf16"])
def test_bfloat16_is_near(name):
    network = networks.made("audiocsrnet")
    features = networks.batch(network, 2)
    near(select_runtime(name).ready(network), features, on_eager(network, features), 0.02)


@pytest.mark.parametrize("kind", ["audiocsrnet", "transcrowd-tiles"])
def test_int8_is_near(kind):
    """By ranges measured on other batches; the stages that see are quantised, audio encoders and exits are not."""
    network = networks.made(kind)
    network.activation_ranges = measure_ranges(network, [networks.batch(network, 2, seed=seed) for seed in range(4)])
    chain = OpenVINO("openvino-int8").ready(network)
    features = networks.batch(network, 2, seed=9)
    near(chain, features, on_eager(network, features), 0.05)
    subgraphs = partition(quantised(network, network.activation_ranges))
    kinds = {
        name: {node.get_type_name() for node in openvino.convert(subgraph).get_ops()}
        for name, subgraph in subgraphs.items()
    }
    input_map = {
        "audiocsrnet": ("stage-0", "stage-2", "stage-3"),
        "transcrowd-tiles": ("stage-1", "stage-2", "stage-3"),
    }
    assert {name for name, types in kinds.items() if "FakeQuantize" in types} == set(input_map[kind])


def test_without_ranges_there_is_no_int8():
    with pytest.raises(RuntimeUnavailable, match=r"^openvino-int8: the checkpoint has no activation ranges"):
        OpenVINO("openvino-int8").ready(networks.made("audiocsrnet"))


def test_quantised_values_are_on_their_levels():
    """Both sides of zero, and from zero up; what lies outside of the range is at its end."""
    network = networks.made("audiocsrnet")
    name = next(name for name, layer in network.stages[0].named_modules() if isinstance(layer, torch.nn.Conv2d))
    seen: list[torch.Tensor] = []
    for low, high, levels in ((-1.0, 2.0, (-128, 127)), (0.0, 2.0, (0, 255))):
        copied = quantised(network, {f"stages.0.{name}": ActivationRange(low, high)})
        layer = copied.stages[0].get_submodule(name)
        layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            layer(torch.linspace(-3, 3, 3 * 64 * 64).reshape(1, 3, 64, 64))
        step = 2.0 / levels[1]
        of_input = seen[-1] / step
        torch.testing.assert_close(of_input, of_input.round())
        assert (round(float(of_input.min())), round(float(of_input.max()))) == levels
        plain = network.stages[0].get_submodule(name).weight.detach()
        apart = (layer.weight.detach() - plain).abs().amax((1, 2, 3)) / plain.abs().amax((1, 2, 3))
        assert 0 < float(apart.max()) <= 0.5 / 63 + 1e-6


@pytest.mark.parametrize("make", [Eager, OpenVINO], ids=["eager", "openvino"])
def test_samples_that_have_left_are_gone(make):
    """Compaction between stages: what stays answers as if the rest had never been there."""
    network = networks.made("audiocsrnet")
    features = networks.batch(network, 4)
    chain = make().ready(network)
    expected = on_eager(network, features)
    state = chain.begin(features)
    for index, keep in enumerate((torch.tensor([True, False, True, True]), torch.tensor([2, 0]))):
        state = chain.select(chain.advance(index, state), keep)
    left = [3, 0]  # of 0, 2, 3 the last and the first
    state = chain.advance(3, chain.advance(2, state))
    answer = chain.run_exit("final", state)
    torch.testing.assert_close(answer.value, expected["final"].value[left], **EXACT)
    torch.testing.assert_close(answer.density, expected["final"].density[left], **EXACT)


def test_a_state_is_not_overwritten_by_the_next_batch():
    network = networks.made("audiocsrnet")
    one, other = networks.batch(network, 2, seed=1), networks.batch(network, 2, seed=2)
    chain = OpenVINO().ready(network)
    first = chain.advance(0, chain.begin(one))
    answer = chain.run_exit("V1", first)
    kept = answer.value.clone()
    second = chain.advance(0, chain.begin(other))
    chain.run_exit("V1", second)
    assert torch.equal(answer.value, kept)
    assert torch.equal(chain.run_exit("V1", first).value, kept)


def test_a_stage_and_an_exit_take_what_they_read_and_no_more():
    subgraphs = partition(networks.made("audiocsrnet"))
    takes = {name: [spec.name for spec in subgraph.signature.inputs] for name, subgraph in subgraphs.items()}
    gives = {name: [spec.name for spec in subgraph.signature.outputs] for name, subgraph in subgraphs.items()}
    assert takes["stage-0"] == takes["exit-V1"] == takes["exit-AV2"] == ["visual"]
    assert (takes["stage-1"], gives["stage-1"]) == (["log_mel", "has_audio"], ["audio"])
    assert takes["stage-2"] == takes["exit-AV1"] == ["visual", "audio"]
    assert (takes["exit-final"], gives["exit-final"]) == (["visual", "valid_mask"], ["value", "density"])
    classifier = partition(networks.made("classifier"))
    assert [spec.name for spec in classifier["stage-1"].signature.inputs] == ["visual", "shortcut"]


def test_what_nobody_takes_any_more_is_let_go():
    network = networks.made("audiocsrnet")
    chain = OpenVINO().ready(network)
    state = chain.begin(networks.batch(network, 1))
    held = []
    for index in range(4):
        state = chain.advance(index, state)
        held.append(set(state))
    assert held == [
        {"visual", "log_mel", "has_audio", "valid_mask"},
        {"visual", "audio", "valid_mask"},
        {"visual", "audio", "valid_mask"},
        {"visual", "valid_mask"},
    ]


def test_nothing_behind_the_exit_is_converted(monkeypatch):
    network = networks.made("audiocsrnet")
    ran: list[str] = []
    convert = openvino.convert
    subgraphs: dict[int, str] = {}

    def watched(subgraph, shapes):
        ran.append(subgraphs[id(subgraph.module)])
        return convert(subgraph, shapes)

    monkeypatch.setattr(openvino, "convert", watched)
    subgraphs |= {id(subgraph.module): name for name, subgraph in partition(network).items()}
    chain = OpenVINO().ready(network)
    next(chain.stream(networks.batch(network, 1), ["V1", "final"]))
    assert ran == ["stage-0", "exit-V1"]


def test_sizes_are_bounded_and_come_again(monkeypatch):
    """Images of any size, each converted once; of the sizes that are kept, the one not used for longest goes."""
    network = networks.made("audiocsrnet")
    subgraphs = partition(network)
    converted: list[tuple[str, tuple]] = []

    def model(subgraph, shapes):
        converted.append((subgraph, shapes))
        return openvino.convert(subgraphs[subgraph], shapes)

    monkeypatch.setattr(engines, "MOST_READY", 2)
    engine = engines.OpenVINOEngine(model)
    stage = subgraphs["stage-0"]
    for width, times in ((64, 1), (64, 1), (96, 2), (64, 2), (128, 3), (96, 4), (128, 4)):
        image = torch.randn(2, 3, 64, width)
        [given] = engine.run("stage-0", [image.numpy()])
        with torch.no_grad():
            [wanted] = stage(image)
        torch.testing.assert_close(torch.from_numpy(given), wanted, **EXACT)
        assert len(converted) == times


def test_models_go_with_their_engine(monkeypatch):
    """At once, in the thread that lets go of it: nothing is left for whoever collects garbage next."""

    class Model:
        pass

    class Fake(engines.Engine):
        library = "fake"

        def _ready(self, subgraph, model, shapes):
            return Model()

        def _run(self, ready, arrays):
            gone.append(weakref.ref(ready))
            return arrays

    gone: list[weakref.ref] = []
    monkeypatch.setattr(engines, "MOST_READY", 2)
    engine = Fake(lambda subgraph, shapes: None)
    gc.disable()
    try:
        for width in (1, 2, 1, 3):
            engine.run("stage-0", [np.zeros((1, width))])
        one, two, again, three = (ref() for ref in gone)
        assert one is again
        assert two is None
        assert one is not three
        del one, two, again, three, engine
        assert not any(ref() for ref in gone)
    finally:
        gc.enable()


LET_GO_ELSEWHERE = """
import signal
import threading

import numpy as np
import openvino
from openvino import opset13

from crowdexit.runtimes.engines import OpenVINOEngine

taken = opset13.parameter([-1, 3], np.float32)
engines = [OpenVINOEngine(lambda piece, shapes: openvino.Model([opset13.relu(taken)], [taken]))]
engines[0].run("stage-0", [np.zeros((1, 3), np.float32)])
thread = threading.Thread(target=engines.clear)
thread.start()
thread.join()
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_engine_that_another_thread_lets_go_of_leaves_signals_alone():
    """OpenVINO's stack for signals would go with it, and the next of them would end the process without a word."""
    command = [sys.executable, "-c", LET_GO_ELSEWHERE]
    report = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (report.returncode, report.stdout) == (0, "interrupted\n"), report.stderr


def test_a_network_that_is_ready_is_left_alone():
    """A thread may be running it while it is made ready once more."""
    network = networks.made("audiocsrnet")
    Eager().ready(network)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in network.parameters() if p.dim() == 4)
    touched: list[torch.nn.Module] = []
    for module in network.modules():
        module._apply = lambda *given, module=module, **how: touched.append(module) or module
    Eager().ready(network)
    assert touched == []


def test_another_image_size():
    """The final exit takes any; the branches' heads are made for theirs, and the line says which could not."""
    network = networks.made("audiocsrnet")
    features = inputs(torch.randn(1, 3, 128, 128))
    chain = OpenVINO().ready(network)
    expected = dict(Eager().ready(network).stream(features, ["final"]))
    answer = dict(chain.stream(features, ["final"]))["final"]
    torch.testing.assert_close(answer.value, expected["final"].value, **EXACT)
    with pytest.raises(RuntimeUnavailable, match="OpenVINO cannot compile exit-V1: "):
        dict(chain.stream(features, ["V1"]))


@pytest.mark.parametrize(
    ("name", "module"),
    [("openvino", "openvino"), ("openvino-int8", "openvino"), ("onnx", "onnxruntime"), ("onnx", "onnxscript")],
)
def test_what_is_not_installed_is_said_with_how_to_install_it(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailable, match=rf"^{module} is not installed: pip install {module}$"):
        select_runtime(name)


def test_what_is_installed_and_cannot_be_imported_is_said_with_why(monkeypatch, tmp_path):
    """Nobody is sent to install what is there."""
    monkeypatch.syspath_prepend(tmp_path)
    for text, why in (
        ("import not_there_at_all", "No module named 'not_there_at_all'"),
        ("raise ImportError('libtbb.so.12: no such file')", "libtbb.so.12: no such file"),
        ("raise OSError('a wrong ELF class')", "a wrong ELF class"),
    ):
        (tmp_path / "broken_library.py").write_text(text + "\n" * len(why))  # the length tells a stale .pyc
        with pytest.raises(RuntimeUnavailable, match=f"^broken_library cannot be imported: {why}$"):
            engines.installed("broken_library")


def test_errors_of_a_gpu_are_one_line_and_of_a_cpu_our_own():
    with pytest.raises(RuntimeUnavailable, match=r"^the GPU cannot run it: CUDA out of memory\.$"), _on(CUDA):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTry this and that")
    with pytest.raises(RuntimeError, match="of our own"), _on(torch.device("cpu")):
        raise RuntimeError("of our own")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailable, match="'cuda-half' needs a CUDA GPU; none found"):
        select_runtime("cuda-half")
    with pytest.raises(RuntimeUnavailable, match=rf"no runtime 'abacus' \(there are {', '.join(names())}\)"):
        select_runtime("abacus")


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 1)
    monkeypatch.setattr(openvino, "convert", lambda subgraph, shapes: 1 / 0)
    with pytest.raises(RuntimeUnavailable, match="OpenVINO cannot compile stage-0: division by zero"):
        dict(OpenVINO().ready(network).stream(features))

    def broken(graph, examples):
        raise RuntimeError("no C++ compiler\nand many more words")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(RuntimeUnavailable, match=r"torch\.compile cannot compile stage-0: .*no C") as caught:
        dict(compiled.Compiled().ready(network).stream(features))
    assert "\n" not in str(caught.value)


def test_a_conversion_that_fails_leaves_the_log_as_it_was(monkeypatch):
    """OpenVINO's converter has the root logger tell errors only, and forgets to take that back."""
    root = logging.getLogger()
    before = root.level, [*root.filters], [*root.handlers]

    def broken(*_, **__):
        root.setLevel(logging.CRITICAL)
        root.addFilter(lambda record: False)
        raise RuntimeError("an operation that nobody knows")

    monkeypatch.setattr("openvino.convert_model", broken)
    subgraphs = partition(networks.made("audiocsrnet"))
    with pytest.raises(RuntimeError, match="nobody knows"):
        openvino.convert(subgraphs["stage-0"])
    assert (root.level, root.filters, root.handlers) == before


def test_compiled_network_is_ready_before_the_first_image(monkeypatch):
    """No latency and no deadline counts the compiling, a compiler that is missing is reported at once, and what is not
    served is not compiled."""
    graphs: list[int] = []

    def compiler(graph, examples):
        graphs.append(1)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=compiler, fullgraph=True))
    for kind, exits, subgraphs in (("audiocsrnet", ["V1", "AV1"], 4), ("transcrowd-tiles", ["final"], 5)):
        network = networks.made(kind)
        width, height = network.config.scene
        graphs.clear()
        counter = CrowdCounter(network, "tiny", runtime=compiled.Compiled(), exits=exits)
        assert len(graphs) == subgraphs
        list(counter.stream(np.zeros((height, width, 3), np.uint8), np.zeros((96, 64), np.float32)))
        assert len(graphs) == subgraphs

    def missing(graph, examples):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=missing))
    with pytest.raises(RuntimeUnavailable, match="no C"):
        CrowdCounter(network, "tiny", runtime=compiled.Compiled())


def test_ports_are_named_like_the_fields_of_records():
    """An export's manifest is checked by these names, without PyTorch."""
    tensors = {f.name: f.type for f in fields(Features)}
    assert list(FEATURE_FIELDS) == [name for name, kind in tensors.items() if "Tensor" in kind]
    assert list(OUTPUT_FIELDS) == [f.name for f in fields(ExitOutput)]


def test_a_model_that_gives_less_than_its_ports_is_one_line():
    class Short:
        def run(self, subgraph, arrays):
            return []

    subgraphs = partition(networks.made("audiocsrnet"))
    signatures = {name: subgraph.signature for name, subgraph in subgraphs.items()}
    chain = ArrayChain({"V1": 0}, signatures, Short())
    with pytest.raises(RuntimeUnavailable, match=r"^stage-0 returns 0 arrays, not 1$"):
        chain.advance(0, {"visual": np.zeros((1, 3, 64, 128), np.float32)})


def test_no_telemetry():
    """Both libraries would report their use to their makers."""
    import os

    import openvino  # noqa: F401

    assert sys.modules["openvino_telemetry"] is None
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
