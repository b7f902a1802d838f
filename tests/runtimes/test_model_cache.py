"""Converted models stay in the user's cache: found again, bounded, and never needed."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import networks
import pytest
import torch

from crowdexit.inference.counter import CrowdCounter
from crowdexit.models import zoo
from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes import model_cache, openvino
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.int8 import measure_ranges
from crowdexit.runtimes.model_cache import ModelCache, fingerprint
from crowdexit.runtimes.openvino import OpenVINO
from crowdexit.utils.machine import cache_folder


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
    assert not list(cache_folder().rglob("part-*"))


def test_a_cached_network_is_not_traced_again(monkeypatch):
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 1)
    first = dict(OpenVINO().ready(network).stream(features))
    monkeypatch.setattr(model_cache, "partition", lambda *_: pytest.fail("traced"))
    again = dict(OpenVINO().ready(network).stream(features))
    for name, answer in first.items():
        torch.testing.assert_close(again[name].value, answer.value, rtol=0, atol=0)


@pytest.mark.parametrize("suffix", [".xml", ".bin", ".json"])
def test_what_is_damaged_is_made_anew(suffix, converted):
    """A readable model whose weights are others above all: it would count, and wrongly."""
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 2)
    expected = dict(OpenVINO().ready(network).stream(features))
    for path in cache_folder().rglob(f"*{suffix}"):
        contents = bytearray(path.read_bytes())
        contents[len(contents) // 2] ^= 0x40
        path.write_bytes(contents)
    for _ in range(2):
        answers = dict(OpenVINO().ready(network).stream(features))
        for name, answer in answers.items():
            torch.testing.assert_close(answer.value, expected[name].value, rtol=0, atol=0)
        assert len(converted) == 12  # and kept again


def test_counter_is_ready_before_the_first_image(converted):
    """No latency and no deadline counts the compiling, and what is not served is not made ready."""
    network = networks.made("audiocsrnet")
    counter = CrowdCounter(network, "tiny", runtime=OpenVINO(), exits=["V1", "AV1"])
    assert len(converted) == 4
    list(counter.stream(torch.zeros(64, 128, 3, dtype=torch.uint8).numpy()))
    assert len(converted) == 4


def test_int8_models_are_cached_by_their_ranges(converted):
    network = networks.made("audiocsrnet")
    features = networks.batch(network, 1)
    network.activation_ranges = measure_ranges(network, [features])
    first = dict(OpenVINO("openvino-int8").ready(network).stream(features))
    subgraphs = len(converted)
    again = dict(OpenVINO("openvino-int8").ready(network).stream(features))
    assert len(converted) == subgraphs
    for name, answer in first.items():
        torch.testing.assert_close(again[name].value, answer.value)
    ranges = network.activation_ranges
    network.activation_ranges = {name: replace(found, high=2 * found.high) for name, found in ranges.items()}
    dict(OpenVINO("openvino-int8").ready(network).stream(features))
    assert len(converted) == 2 * subgraphs


def test_a_cache_that_cannot_be_written_is_no_matter(monkeypatch, tmp_path, converted):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    network = networks.made("transcrowd-fit")
    features = networks.batch(network, 1)
    expected = dict(Eager().ready(network).stream(features, ["final"]))
    answer = dict(OpenVINO().ready(network).stream(features, ["final"]))["final"]
    torch.testing.assert_close(answer.value, expected["final"].value)


def models(name: str) -> ModelCache[bytes]:
    network = networks.made(name)
    return ModelCache(network, "any", ".onnx", lambda path: path.read_bytes(), lambda m, path: path.write_bytes(m))


def test_a_damaged_file_of_bytes_is_no_model():
    """Whatever is read of it would pass for one."""
    some = models("audiocsrnet")
    some.keep("stage-0", ((1, 2),), b"model")
    [path] = cache_folder().rglob("*.onnx")
    for damage in (b"modem", b"mode", b""):
        path.write_bytes(damage)
        assert some.get("stage-0", ((1, 2),)) is None
    assert some.model("stage-0", ((1, 2),), lambda: b"anew") == b"anew"
    assert some.get("stage-0", ((1, 2),)) == b"anew"


@pytest.mark.parametrize("error", [OSError("no space left"), RuntimeError("Check 'bin_file' failed")])
def test_nothing_is_left_of_what_could_not_be_written(error):
    def write(model: bytes, path: Path) -> None:
        path.write_bytes(model[:1])
        raise error

    network = networks.made("audiocsrnet")
    some = ModelCache(network, "any", ".onnx", lambda path: path.read_bytes(), write)
    assert some.model("stage-0", ((1, 2),), lambda: b"model") == b"model"
    assert some.get("stage-0", ((1, 2),)) is None
    assert [path for path in cache_folder().rglob("*") if path.is_file() or path.name.startswith("part-")] == []


def test_without_a_home_nothing_is_cached(homeless):
    some = models("audiocsrnet")
    some.keep("stage-0", ((1, 2),), b"model")
    assert some.model("stage-0", ((1, 2),), lambda: b"anew") == b"anew"
    model_cache.save_choice("key", "eager")
    model_cache.forget_choice("key")
    assert model_cache.choices() == {}


def test_choice_is_cached_until_forgotten(monkeypatch):
    monkeypatch.setattr(model_cache, "MOST_CHOICES", 2)
    for key in ("one", "two", "three"):
        model_cache.save_choice(key, "eager")
    assert model_cache.choices() == {"two": "eager", "three": "eager"}
    model_cache.forget_choice("two")
    model_cache.forget_choice("never")
    assert model_cache.choices() == {"three": "eager"}
    assert [path.name for path in cache_folder().iterdir()] == ["runtimes.json"]


def test_most_recent_networks_stay_cached(monkeypatch):
    monkeypatch.setattr(model_cache, "MOST_NETWORKS", 2)
    one, two, three = (models(name) for name in ("audiocsrnet", "transcrowd-fit", "classifier"))
    for age, some in ((3, one), (2, two)):
        some.keep("stage-0", ((1, 2),), b"model")
        os.utime(some._folder, (0, 10 - age))
    assert one.get("stage-0", ((1, 2),)) == b"model"  # used: now the younger
    assert one.get("stage-0", ((1, 3),)) is one.get("stage-1", ((1, 2),)) is None
    three.keep("stage-0", ((1, 2),), b"model")
    assert [some.get("stage-0", ((1, 2),)) for some in (one, two, three)] == [b"model", None, b"model"]


def branched(model: str, kind: str, **options: object) -> MultiExitNetwork:
    """A network with a branch of its own options; the same weights wherever these give the same shapes."""
    torch.manual_seed(0)
    place, changes = ("V1", networks.SPECS["audiocsrnet"].changes) if model == "audiocsrnet-s" else ("1", networks.VIT)
    return zoo.build(zoo.Spec(model, (zoo.ExitSpec("one", place, kind, options),), changes))


def test_weights_exits_code_and_libraries_make_the_fingerprint(monkeypatch, tmp_path):
    network = networks.made("audiocsrnet")
    prints = [fingerprint(network)]
    assert prints == [fingerprint(networks.made("audiocsrnet").to(memory_format=torch.channels_last))]
    with torch.no_grad():
        network.final.conv.bias += 1e-3
    prints.append(fingerprint(network))
    monkeypatch.setattr(model_cache, "installed_version", lambda name: "9")
    prints.append(fingerprint(network))
    for path in ("models/network.py", "models/exits/head.py"):
        source = tmp_path / path
        source.parent.mkdir(parents=True, exist_ok=True)
        source.write_text("# another way to the same names")
        package = shutil.copytree(tmp_path, tmp_path.with_name(f"{len(prints)}"))
        monkeypatch.setattr(model_cache, "PACKAGE", package)
        prints.append(fingerprint(network))
    assert len(set(prints)) == 5


@pytest.mark.parametrize(
    ("model", "one", "other"),
    [
        ("audiocsrnet-s", ("slvit", {}), ("slvit", {"second_residual": False})),
        ("audiocsrnet-s", ("cnn", {"pool": 2}), ("cnn", {"pool": 2, "dropout": 0.0})),
        ("transcrowd-token-s", ("cnn-ignore", {}), ("cnn-add", {})),
    ],
)
def test_branches_of_equal_weights_have_entries_of_their_own(model, one, other):
    networks_ = [branched(model, kind, **options) for kind, options in (one, other)]
    weights = [{name: tensor.tolist() for name, tensor in n.state_dict().items()} for n in networks_]
    assert weights[0] == weights[1]
    assert len({fingerprint(n) for n in networks_}) == 2


def test_the_code_that_makes_a_graph_is_found():
    """The patterns still name what is there."""
    found = [path.name for pattern in model_cache._SOURCES for path in model_cache.PACKAGE.glob(pattern)]
    assert {"vit.py", "feature_map.py", "network.py", "stages.py", "subgraphs.py", "openvino.py"} <= set(found)
