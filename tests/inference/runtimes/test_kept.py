"""Converted models stay in the user's cache: found again, bounded, and never needed."""

from __future__ import annotations

import os

import networks
import pytest
import torch

from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.runtimes import kept, openvino
from crowdexit.inference.runtimes.eager import Eager
from crowdexit.inference.runtimes.kept import KeptModels, cache_folder, fingerprint
from crowdexit.inference.runtimes.openvino import OpenVINO


@pytest.fixture
def converted(monkeypatch) -> list[int]:
    """A number for each conversion that takes place."""
    done: list[int] = []
    convert = openvino.convert
    monkeypatch.setattr(openvino, "convert", lambda *arguments: done.append(1) or convert(*arguments))
    return done


def test_what_was_converted_is_found_again(converted):
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 2)
    expected = dict(Eager().ready(network).stream(features))
    for _ in range(2):
        answers = dict(OpenVINO().ready(network).stream(features))
        for name, answer in answers.items():
            torch.testing.assert_close(answer.value, expected[name].value)
        assert len(converted) == 6  # four stages, two exits
    for path in cache_folder().rglob("*.xml"):
        path.write_bytes(b"no model")
    dict(OpenVINO().ready(network).stream(features))
    assert len(converted) == 12


def test_a_counter_is_ready_before_its_first_picture(converted):
    """No latency and no deadline counts the compiling, and what is not served is not made ready."""
    network = networks.made("audiocsrnet")
    counter = CrowdCounter(network, "tiny", runtime=OpenVINO(), exits=["V1", "AV1"])
    assert len(converted) == 4
    list(counter.stream(torch.zeros(64, 128, 3, dtype=torch.uint8).numpy()))
    assert len(converted) == 4


def test_int8_on_the_bundled_pictures_is_kept(monkeypatch):
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 1)
    first = dict(OpenVINO("openvino-int8").ready(network).stream(features))
    monkeypatch.setattr(openvino, "quantise", lambda *_: 1 / 0)
    again = dict(OpenVINO("openvino-int8").ready(network).stream(features))
    for name, answer in first.items():
        torch.testing.assert_close(again[name].value, answer.value)


def test_a_cache_that_cannot_be_written_is_no_matter(monkeypatch, tmp_path, converted):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 1)
    expected = dict(Eager().ready(network).stream(features, ["final"]))
    answer = dict(OpenVINO().ready(network).stream(features, ["final"]))["final"]
    torch.testing.assert_close(answer.value, expected["final"].value)


def models(name: str) -> KeptModels[bytes]:
    network = networks.made(name)
    return KeptModels(network, "any", ".onnx", lambda path: path.read_bytes(), lambda m, path: path.write_bytes(m))


def test_the_networks_used_last_are_kept(monkeypatch):
    monkeypatch.setattr(kept, "MOST_NETWORKS", 2)
    one, two, three = (models(name) for name in ("audiocsrnet", "transcrowd-fit", "classifier"))
    for age, some in ((3, one), (2, two)):
        some.keep("stage-0", ((1, 2),), b"model")
        os.utime(some._folder, (0, 10 - age))
    assert one.get("stage-0", ((1, 2),)) == b"model"  # used: now the younger
    assert one.get("stage-0", ((1, 3),)) is one.get("stage-1", ((1, 2),)) is None
    three.keep("stage-0", ((1, 2),), b"model")
    assert [some.get("stage-0", ((1, 2),)) for some in (one, two, three)] == [b"model", None, b"model"]


def test_weights_exits_and_libraries_make_the_fingerprint(monkeypatch):
    network = networks.made("audiocsrnet")
    print_ = fingerprint(network)
    assert print_ == fingerprint(networks.made("audiocsrnet").to(memory_format=torch.channels_last))
    with torch.no_grad():
        network.final.conv.bias += 1e-3
    assert fingerprint(network) != print_
    monkeypatch.setattr(kept, "installed_version", lambda name: "9")
    assert fingerprint(networks.made("audiocsrnet")) != print_
