"""Every runtime answers as eager PyTorch in float32 does, whatever the network, the sounds and the batch."""

from __future__ import annotations

import functools
import logging
import sys

import networks
import pytest
import torch

from crowdexit.inference.runtimes import compiled, engines, openvino
from crowdexit.inference.runtimes.arrays import RuntimeUnavailable
from crowdexit.inference.runtimes.base import ReadyChain
from crowdexit.inference.runtimes.eager import Eager
from crowdexit.inference.runtimes.onnx import Onnx
from crowdexit.inference.runtimes.openvino import OpenVINO
from crowdexit.inference.runtimes.pick import names, pick
from crowdexit.inference.runtimes.pieces import take_apart
from crowdexit.network import MultiExitNetwork
from crowdexit.stages import Features, inputs

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
    same(pick(name).ready(network), features, on_eager(network, features), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("kind", ["audiocsrnet", "transcrowd-tiles"])
def test_int8_is_near(kind, capfd):
    """Quantised on given batches; the stages that see are, the ear and the exits are not."""
    network = networks.made(kind)
    seen = [networks.batch(network, 2, seed=seed) for seed in range(4)]
    chain = OpenVINO("openvino-int8", calibration=lambda config: seen).ready(network)
    features = networks.batch(network, 2, seed=9)
    same(chain, features, on_eager(network, features), rtol=0.05, atol=0.5)
    assert capfd.readouterr().out == ""
    models = openvino.quantise(take_apart(network), network, seen[:1])
    kinds = {name: {node.get_type_name() for node in model.get_ops()} for name, model in models.items()}
    sees = {"audiocsrnet": ("stage-0", "stage-2", "stage-3"), "transcrowd-tiles": ("stage-1", "stage-2", "stage-3")}
    assert {name for name, types in kinds.items() if "FakeQuantize" in types} == set(sees[kind])


def test_int8_without_pictures_of_ones_own_says_so(caplog):
    network = networks.made("audiocsrnet")
    with caplog.at_level(logging.WARNING):
        OpenVINO("openvino-int8").ready(network)
    assert "pictures that come with the project" in caplog.text


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
    answer = chain.ask("final", state)
    torch.testing.assert_close(answer.value, expected["final"].value[left], **EXACT)
    torch.testing.assert_close(answer.density, expected["final"].density[left], **EXACT)


def test_a_state_is_not_overwritten_by_the_next_batch():
    network = networks.made("audiocsrnet")
    one, other = networks.batch(network, 2, seed=1), networks.batch(network, 2, seed=2)
    chain = OpenVINO().ready(network)
    first = chain.advance(0, chain.begin(one))
    answer = chain.ask("V1", first)
    kept = answer.value.clone()
    second = chain.advance(0, chain.begin(other))
    chain.ask("V1", second)
    assert torch.equal(answer.value, kept)
    assert torch.equal(chain.ask("V1", first).value, kept)


def test_a_stage_and_an_exit_take_what_they_read_and_no_more():
    pieces = take_apart(networks.made("audiocsrnet"))
    takes = {name: [port.name for port in piece.ports.takes] for name, piece in pieces.items()}
    gives = {name: [port.name for port in piece.ports.gives] for name, piece in pieces.items()}
    assert takes["stage-0"] == takes["exit-V1"] == takes["exit-AV2"] == ["visual"]
    assert (takes["stage-1"], gives["stage-1"]) == (["log_mel", "heard"], ["audio"])
    assert takes["stage-2"] == takes["exit-AV1"] == ["visual", "audio"]
    assert (takes["exit-final"], gives["exit-final"]) == (["visual", "inside"], ["value", "density"])
    classifier = take_apart(networks.made("classifier"))
    assert [port.name for port in classifier["stage-1"].ports.takes] == ["visual", "aside"]


def test_what_nobody_takes_any_more_is_let_go():
    network = networks.made("audiocsrnet")
    chain = OpenVINO().ready(network)
    state = chain.begin(networks.batch(network, 1))
    held = []
    for index in range(4):
        state = chain.advance(index, state)
        held.append(set(state))
    assert held == [
        {"visual", "log_mel", "heard", "inside"},
        {"visual", "audio", "inside"},
        {"visual", "audio", "inside"},
        {"visual", "inside"},
    ]


def test_nothing_behind_the_exit_is_converted(monkeypatch):
    network = networks.made("audiocsrnet")
    ran: list[str] = []
    convert = openvino.convert
    pieces: dict[int, str] = {}

    def watched(piece, shapes):
        ran.append(pieces[id(piece.module)])
        return convert(piece, shapes)

    monkeypatch.setattr(openvino, "convert", watched)
    pieces |= {id(piece.module): name for name, piece in take_apart(network).items()}
    chain = OpenVINO().ready(network)
    next(chain.stream(networks.batch(network, 1), ["V1", "final"]))
    assert ran == ["stage-0", "exit-V1"]


def test_sizes_are_bounded_and_come_again():
    """Pictures of any size, each converted once; of the sizes that are kept, the one not used for longest goes."""
    network = networks.made("audiocsrnet")
    pieces = take_apart(network)
    converted: list[tuple[str, tuple]] = []

    def model(piece, shapes):
        converted.append((piece, shapes))
        return openvino.convert(pieces[piece], shapes)

    engine = engines.OpenVINOEngine(model, most=2)
    stage = pieces["stage-0"]
    for width, times in ((64, 1), (64, 1), (96, 2), (64, 2), (128, 3), (96, 4), (128, 4)):
        picture = torch.randn(2, 3, 64, width)
        [given] = engine.run("stage-0", [picture.numpy()])
        with torch.no_grad():
            [wanted] = stage(picture)
        torch.testing.assert_close(torch.from_numpy(given), wanted, **EXACT)
        assert len(converted) == times


def test_another_size_of_picture():
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
    [("openvino", "openvino"), ("openvino-int8", "nncf"), ("onnx", "onnxruntime"), ("onnx", "onnxscript")],
)
def test_what_is_not_installed_is_said_with_how_to_install_it(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(RuntimeUnavailable, match=rf"^{module} is not installed: pip install 'crowdexit\[fast\]'$"):
        pick(name)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeUnavailable, match="'cuda-half' needs a CUDA GPU, and there is none"):
        pick("cuda-half")
    with pytest.raises(RuntimeUnavailable, match=rf"no runtime 'abacus' \(there are {', '.join(names())}\)"):
        pick("abacus")


def test_what_cannot_be_compiled_is_one_line(monkeypatch):
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 1)
    monkeypatch.setattr(openvino, "convert", lambda piece, shapes: 1 / 0)
    with pytest.raises(RuntimeUnavailable, match="OpenVINO cannot compile stage-0: division by zero"):
        dict(OpenVINO().ready(network).stream(features))

    def broken(graph, examples):
        raise RuntimeError("no C++ compiler\nand many more words")

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=broken))
    with pytest.raises(RuntimeUnavailable, match=r"torch\.compile cannot compile stage-0: .*no C") as caught:
        dict(compiled.Compiled().ready(network).stream(features))
    assert "\n" not in str(caught.value)


def test_nobody_is_told_what_is_run():
    """Both libraries would report their use to their makers."""
    import os

    import openvino  # noqa: F401

    assert sys.modules["openvino_telemetry"] is None
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"
