"""Checkpoints come back as they were written, and every bad one fails with one clear line."""

from __future__ import annotations

import errno
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from branches import both_kinds
from safetensors.torch import load_file, save_file

from crowdexit.models import zoo
from crowdexit.models.stages import inputs

TINY = {
    "size": [128, 64],
    "width": 1 / 16,
    "audio_width": 1 / 16,
    "dim": 4,
    "heads": 2,
    "filters": 4,
    "hidden": 16,
}


@pytest.fixture
def spec() -> zoo.Spec:
    return zoo.Spec("audiocsrnet-s", both_kinds(), TINY, {"recipe": "none", "mae": {"V1": 1.5}})


@pytest.fixture
def network(spec):
    torch.manual_seed(0)
    return zoo.build(spec).eval()


@pytest.fixture
def path(network, spec, tmp_path) -> Path:
    zoo.save(network, spec, tmp_path / "run" / "model.safetensors")
    return tmp_path / "run" / "model.safetensors"


def fails(work, says: str) -> None:
    with pytest.raises(zoo.ZooError) as error:
        work()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def rewrite(path: Path, change_header=None, change_tensors=None) -> None:
    """Write a checkpoint again with another header or other tensors, and the checksums of these."""
    size = struct.unpack("<Q", path.read_bytes()[:8])[0]
    header = json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"]
    tensors = load_file(path)
    if change_header:
        change_header(header)
    if change_tensors:
        change_tensors(tensors)
    header["weights_checksum"] = zoo._weights_checksum(tensors)
    header["checksum"] = zoo._header_checksum(header)
    save_file(tensors, path, metadata=header)


def test_round_trip(network, spec, path):
    back, read = zoo.load(path)
    assert read == spec
    assert not back.training
    assert back.exit_names == network.exit_names
    for key, tensor in network.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    features = inputs(torch.randn(1, 3, 64, 128), torch.randn(1, 1, 96, 64))
    for name, answer in network(features).items():
        assert torch.equal(back(features)[name].value, answer.value)


def test_half_keeps_vectors_whole_and_matrices_near(network, spec, path, tmp_path):
    zoo.save(network, spec, tmp_path / "half.safetensors", half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * path.stat().st_size
    back, _ = zoo.load(tmp_path / "half.safetensors")
    for key, tensor in network.state_dict().items():
        read = back.state_dict()[key]
        assert read.dtype == tensor.dtype
        expected = tensor.half().float() if tensor.dim() > 1 else tensor
        assert torch.equal(read, expected), key


def test_a_folder_is_as_good_as_its_file(path):
    assert zoo.checkpoint_path(path.parent) == path
    assert zoo.read_spec(zoo.checkpoint_path(str(path.parent))).model == "audiocsrnet-s"


def test_saving_over_replaces_whole(network, spec, path):
    with torch.no_grad():
        network.final.conv.bias.fill_(3.0)
    zoo.save(network, spec, path)
    assert zoo.load(path)[0].final.conv.bias.item() == 3.0


def test_names():
    assert {"audiocsrnet", "audiocsrnet-m", "audiocsrnet-s"} <= set(zoo.names())
    assert set(zoo.shipped()) <= set(zoo.names())
    paper = zoo.build(zoo.Spec("audiocsrnet")).config
    assert (paper.size, paper.width, paper.front_norm, paper.density_activation) == ((1024, 576), 1.0, False, "none")


def test_no_such_model_or_file(tmp_path):
    fails(lambda: zoo.build(zoo.Spec("nothing")), "no model 'nothing' (there are audiocsrnet")
    fails(lambda: zoo.load("nothing"), "neither a model's name")
    fails(lambda: zoo.load(tmp_path), "neither a model's name")
    fails(lambda: zoo.load(""), "neither a model's name")


@pytest.mark.parametrize(
    ("changes", "exits", "says"),
    [
        ({"colour": 3}, (), "colour"),
        ({"width": "wide"}, (), ""),
        ({"size": [128]}, (), "multiples of 8"),
        ({"size": [128, 60]}, (), "multiples of 8"),
        ({"size": 3}, (), ""),
        ({"width": -1}, (), ""),
        ({"dim": -4}, (zoo.ExitSpec("V1", "V1", "slvit"),), ""),
        ({"patch": 0}, (zoo.ExitSpec("V1", "V1", "slvit"),), ""),
        ({"size": [128, 72]}, (zoo.ExitSpec("V1", "V1", "slvit"),), "a patch of 8 does not divide a map of 9×16"),
        ({}, (zoo.ExitSpec("x", "V7", "cnn"),), "no exit location 'V7'"),
        ({}, (zoo.ExitSpec("x", "V1", "perceiver"),), "no branch of kind 'perceiver'"),
        ({}, (zoo.ExitSpec("final", "V1", "cnn"),), "exit 'final' already exists"),
        ({}, (zoo.ExitSpec("a.b", "V1", "cnn"),), "a.b"),
        ({}, (zoo.ExitSpec("stages", "V1", "cnn"), zoo.ExitSpec("stages", "V1", "cnn")), "already"),
    ],
)
def test_descriptions_that_build_nothing(changes, exits, says):
    fails(lambda: zoo.build(zoo.Spec("audiocsrnet-s", exits, {**TINY, **changes})), says)


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04" + bytes(200), b"\xff" * 500])
def test_not_a_checkpoint(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    fails(lambda: zoo.load(tmp_path / "x.safetensors"), "not a checkpoint")


def test_another_safetensors_file(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    fails(lambda: zoo.load(tmp_path / "x.safetensors"), "but not a CrowdExit checkpoint")


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.999])
def test_truncated(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    fails(lambda: zoo.load(path), "not a checkpoint")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("format", "crowdexit-99", "not a CrowdExit checkpoint"),
        ("model", "resnet9000", "no model 'resnet9000'"),
        ("model", "audiocsrnet", "another architecture"),
        ("exits", "[", "header is damaged"),
        ("exits", "{}", "header is damaged"),
        ("exits", "3", "header is damaged"),
        ("exits", '[{"name": "V1"}]', "header is damaged"),
        ("exits", '[["V1", "V1", "cnn"]]', "header is damaged"),
        ("exits", '[{"name": 1, "place": "V1", "kind": "cnn"}]', "header is damaged"),
        ("exits", "[]", "the network does not have 'branches."),
        ("changes", "[]", "header is damaged"),
        ("changes", "null", "header is damaged"),
        ("changes", '{"dim": 5}', "another architecture"),
        ("changes", '{"size": "large"}', ""),
        ("meta", "7", "header is damaged"),
    ],
)
def test_tampered_header(path, key, value, says):
    rewrite(path, lambda header: header.__setitem__(key, value))
    fails(lambda: zoo.load(path), says)


@pytest.mark.parametrize("key", ["model", "exits", "changes", "meta"])
def test_header_with_a_hole(path, key):
    rewrite(path, lambda header: header.pop(key))
    fails(lambda: zoo.load(path), "header is damaged")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(path, value):
    rewrite(path, change_tensors=lambda tensors: tensors["final.conv.weight"].view(-1)[0].fill_(value))
    fails(lambda: zoo.load(path), "'final.conv.weight' is not finite")


def test_other_architectures(path):
    rewrite(path, change_tensors=lambda tensors: tensors.pop("final.conv.weight"))
    fails(lambda: zoo.load(path), "it lacks 'final.conv.weight'")
    rewrite(path, change_tensors=lambda tensors: tensors.update({"final.conv.weight": torch.zeros(1, 9, 1, 1)}))
    fails(lambda: zoo.load(path), "it has another shape of 'final.conv.weight'")
    rewrite(path, change_tensors=lambda tensors: tensors.update(surplus=torch.zeros(2)))
    fails(lambda: zoo.load(path), "does not have 'surplus'")


def test_shipped_checkpoints_are_whole():
    assert set(zoo.shipped()) == {"audiocsrnet-lite", "audiocsrnet-s", "transcrowd-token-s"}
    for name in zoo.shipped():
        zoo.load(name)


def test_a_changed_byte_anywhere_is_found(path):
    """Names, types, shapes, the description and the weights: never a traceback, never other weights without a word."""
    data, random = path.read_bytes(), np.random.default_rng(0)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    before, refused = zoo.read_tensors(path), []
    for at in [*range(8), *random.integers(8, header, 150), *random.integers(header, len(data), 150)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << random.integers(8)
        path.write_bytes(flipped)
        try:
            zoo.load(path)
        except zoo.ZooError as error:
            refused.append(str(error))
        else:  # a byte of the header that means nothing
            after = zoo.read_tensors(path)
            assert after.keys() == before.keys()
            assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
    assert all(line.startswith((f"{path}: ", "audiocsrnet-s: ")) and "\n" not in line for line in refused)
    assert len(refused) > 290
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    fails(lambda: zoo.load(path), "the weights are damaged (their checksum does not match)")
    fails(lambda: zoo.annotate(path, note=1), "the weights are damaged")


def test_what_has_no_checksum_is_refused(path):
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": zoo.FORMAT, "model": "audiocsrnet-s"})
    fails(lambda: zoo.read_spec(path), "its checksum does not match")


def test_a_full_disk_keeps_the_checkpoint_that_is_there(network, spec, path, monkeypatch):
    before = path.read_bytes()

    def full(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    fails(lambda: zoo.save(network, spec, path), "MB needed, ")
    fails(lambda: zoo.save(network, spec, path), f"free in {path.parent}); the existing file is unchanged")
    fails(lambda: zoo.annotate(path, note=1), f"{path}: the disk is full (")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


def test_optional_tensors_may_be_missing_and_keep_their_value(network):
    tensors = dict(network.state_dict())
    start = tensors.pop("final.conv.bias").clone()
    fails(lambda: zoo.fill(network, tensors, "x"), "it lacks 'final.conv.bias'")
    zoo.fill(network, tensors, "x", optional=lambda key: key.startswith("final."))
    assert torch.equal(network.final.conv.bias, start)


def test_some_exits_alone(tmp_path):
    changes = {"size": [64, 64], "dim": 12, "depth": 3, "heads": 2, "hidden": 8}
    exits = tuple(zoo.ExitSpec(f"{place}-{kind}", place, kind) for place in "12" for kind in ("mlp", "cnn-add"))
    spec = zoo.Spec("transcrowd-token", exits, changes)
    network = zoo.build(spec).eval()
    fewer, report = zoo.with_exits(network, spec, ["2-cnn-add", "1-mlp"])
    assert [e.name for e in report.exits] == ["2-cnn-add", "1-mlp"]
    image = inputs(torch.randn(1, 3, 64, 64))
    with torch.no_grad():
        before, after = network(image), fewer(image)
    assert set(after) == {"1-mlp", "2-cnn-add", "final"}
    assert all(torch.equal(answer.value, before[name].value) for name, answer in after.items())
    for names, message in ((["3-mlp"], "no early exit '3-mlp'"), (["1-mlp", "1-mlp"], "twice")):
        with pytest.raises(zoo.ZooError, match=message):
            zoo.with_exits(network, spec, names)
