"""Exported folders: whole, the same counts without PyTorch, and one line for whatever is damaged."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import networks
import numpy as np
import openvino as openvino_library
import pytest
import torch
from typer.testing import CliRunner

from crowdexit.calibration.familiarity import fit
from crowdexit.calibration.intervals import Intervals
from crowdexit.calibration.temperatures import Temperatures
from crowdexit.cli.main import app
from crowdexit.data.mel import AudioInput
from crowdexit.errors import CrowdExitError
from crowdexit.export import standalone
from crowdexit.export.manifest import read_manifest
from crowdexit.export.runner import Exported
from crowdexit.export.standalone import ExportError
from crowdexit.export.writer import export
from crowdexit.inference.counter import CrowdCounter, load
from crowdexit.inference.models import keep_calibration, open_model
from crowdexit.models import zoo
from crowdexit.runtimes import openvino
from crowdexit.runtimes.batch import make_batch
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.engines import Engine
from crowdexit.utils import command
from crowdexit.utils.checksum import checksum

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.integers(0, 255, (90, 140, 3), np.uint8)
HUGE = RANDOM.integers(0, 255, (300, 1100, 3), np.uint8)
AUDIO = RANDOM.normal(size=(96, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """Folders with a checkpoint for each of ``SPECS``."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, spec in networks.SPECS.items():
        zoo.save(networks.made(name), spec, folder / name / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory) -> Path:
    """AudioCSRNet with one early exit, for OpenVINO."""
    out: Path = tmp_path_factory.mktemp("exports") / "tiny"
    return export(checkpoints / "audiocsrnet", out, exits=["AV1"])


def counts_of(exported: Exported, *sample, **options) -> dict[str, float]:
    return {result.exit: result.count for result in exported.stream(*sample, **options)}


def by_eager(folder: Path, image: np.ndarray, audio: np.ndarray | None) -> dict[str, float]:
    network, spec = zoo.load(folder)
    counter = CrowdCounter(network, spec.model, runtime=Eager(), exits=network.exit_names)
    return {result.exit: result.count for result in counter.stream(image, audio)}


@pytest.mark.parametrize("kind", ["audiocsrnet", "transcrowd-tiles"])
def test_the_same_counts_without_torch(kind, checkpoints, tmp_path):
    """In a process that never imports PyTorch: heard and not, small and in several scenes, all exits and some."""
    out = export(checkpoints / kind, tmp_path / "export")
    assert {path.name for path in tmp_path.iterdir()} == {"export"}
    np.savez(tmp_path / "seen.npz", image=IMAGE, huge=HUGE, audio=AUDIO)
    script = f"""
import json, sys
import numpy as np
from crowdexit.export.runner import Exported
seen = np.load({str(tmp_path / "seen.npz")!r})
exported = Exported({str(out)!r})
def counts_of(*sample, **options):
    return {{result.exit: result.count for result in exported.stream(*sample, **options)}}
said = [counts_of(seen["image"]), counts_of(seen["image"], seen["audio"]), counts_of(seen["huge"])]
said.append(counts_of(seen["image"], exits=[exported.chain.exit_names[0]]))
assert "torch" not in sys.modules
print(json.dumps(said))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    without_audio, has_audio, huge, first = json.loads(done.stdout)
    for counts, image, audio in ((without_audio, IMAGE, None), (has_audio, IMAGE, AUDIO), (huge, HUGE, None)):
        expected = by_eager(checkpoints / kind, image, audio)
        assert list(counts) == list(expected)
        assert counts == pytest.approx(expected, rel=1e-4)
    assert first == {name: count for name, count in without_audio.items() if name == next(iter(without_audio))}


def test_the_same_results_as_the_counter(checkpoints, tmp_path):
    """Intervals, density, audio and familiarity included, whole and in tiles."""
    path = tmp_path / "m" / "model.safetensors"
    network, spec = zoo.load(checkpoints / "audiocsrnet")
    zoo.save(network, spec, path)
    widths = {name: 0.1 * (at + 1) for at, name in enumerate(network.exit_names)}
    images = [RANDOM.integers(0, 255, (90, 140, 3), np.uint8) for _ in range(150)]
    plain = CrowdCounter(network, "plain", runtime=Eager())
    sums = [plain.predictor.feature_sums(image) for image in images]
    keep_calibration(path, intervals=Intervals(0.9, widths, widths, 20), familiarity=fit(sums))
    counter, exported = load(path, runtime="eager"), Exported(export(path, tmp_path / "export"))
    assert counter.familiarity is not None
    for image, audio in ((images[0], AUDIO), (images[1], None), (HUGE, AUDIO), (np.zeros_like(IMAGE), None)):
        expected = list(counter.stream(image, audio))
        results = list(exported.stream(image, audio, exits=counter.exits))
        for result, of_counter in zip(results, expected, strict=True):
            assert (result.exit, result.audio) == (of_counter.exit, of_counter.audio)
            assert result.familiar is of_counter.familiar
            assert result.count == pytest.approx(of_counter.count, rel=1e-4, abs=1e-3)
            assert result.interval == pytest.approx(of_counter.interval, rel=1e-4, abs=1e-3)
            assert (result.density is None) == (of_counter.density is None)
            if of_counter.density is not None:
                np.testing.assert_allclose(result.density, of_counter.density, rtol=1e-3, atol=1e-4)
        assert [result.latency_ms for result in results] == sorted(result.latency_ms for result in results)
    assert exported.count(images[0]).chosen.exit == "final"
    assert exported.count(images[0], AudioInput(None, "unreadable")).audio == "unreadable"


def test_boxes_that_count_below_zero_are_added_like_the_others(tmp_path):
    """A regressor may undershoot zero in one box of a large image; both ways of counting clamp the sum alone."""
    image = np.zeros((200, 700, 3), np.uint8)
    image[:, 350:] = RANDOM.integers(0, 255, (200, 350, 3))
    boxes = [np.ascontiguousarray(image[:, :350]), np.ascontiguousarray(image[:, 350:])]
    spec = zoo.Spec("audiocsrnet-s", (zoo.ExitSpec("V1", "V1", "cnn"),), networks.SPECS["audiocsrnet"].changes)
    torch.manual_seed(0)
    network = networks.settled(zoo.build(spec))
    last = network.exit_module("V1").head[-1]
    chain = Eager().ready(network)

    def raw() -> list[float]:
        return [float(dict(chain.stream(make_batch(box, None, network.config), ["V1"]))["V1"].value) for box in boxes]

    with torch.no_grad():
        last.weight *= 1000
        low, high = sorted(raw())
        last.bias -= (low + (high - low) / 4) / network.exit_module("V1").scale
    low, high = sorted(raw())
    assert low < -1
    assert low + high > 1
    zoo.save(network, spec, tmp_path / "m" / "model.safetensors")
    counts = counts_of(Exported(export(tmp_path / "m", tmp_path / "export")), image)
    expected = by_eager(tmp_path / "m", image, None)
    assert counts == pytest.approx(expected, rel=1e-3)
    assert counts["V1"] == pytest.approx(low + high, rel=1e-3)


def test_early_exit_of_a_large_image_skips_later_stages(exported, monkeypatch):
    ran: list[str] = []
    run = Engine.run
    monkeypatch.setattr(Engine, "run", lambda self, piece, arrays: ran.append(piece) or run(self, piece, arrays))
    answers = Exported(exported).stream(HUGE)
    assert next(answers).exit == "AV1"
    assert list(dict.fromkeys(ran)) == ["stage-0", "stage-1", "exit-AV1"]
    assert next(answers).exit == "final"
    assert ran[-1] == "exit-final"


def test_absurdly_shaped_image_counts_the_same_in_bounded_memory(exported, monkeypatch):
    expected = counts_of(Exported(exported), HUGE)
    lengths: list[int] = []
    run = Engine.run

    def watched(self, piece, arrays):
        lengths.append(len(arrays[0]))
        return run(self, piece, arrays)

    monkeypatch.setattr(Engine, "run", watched)
    monkeypatch.setattr(standalone, "PIXELS_PER_BATCH", 2 * 128 * 64)
    monkeypatch.setattr(standalone, "PIXELS_IN_FLIGHT", 5 * 128 * 64)
    assert counts_of(Exported(exported), HUGE) == pytest.approx(expected, rel=1e-4)
    # Six boxes, five of them abreast: all of these in two batches of two and one of one, stage by stage.
    assert lengths[:6] == [2, 2, 1] * 2
    assert max(lengths) == 2


def test_onnx_runs_without_torch_and_openvino(tmp_path):
    spec = zoo.Spec("transcrowd-token-s", (), {**networks.VIT, "depth": 1, "audio_width": 0.0})
    torch.manual_seed(0)
    zoo.save(networks.settled(zoo.build(spec)), spec, tmp_path / "m" / "model.safetensors")
    out = export(tmp_path / "m", tmp_path / "export", library="onnx")
    script = f"""
import sys
import numpy as np
from crowdexit.export.runner import Exported
print(Exported({str(out)!r}).count(np.load({str(tmp_path / "seen.npy")!r})).count)
assert "torch" not in sys.modules
assert "openvino" not in sys.modules
"""
    np.save(tmp_path / "seen.npy", IMAGE)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = by_eager(tmp_path / "m", IMAGE, None)
    assert float(done.stdout) == pytest.approx(expected["final"], rel=1e-4)


def test_the_command_and_the_counter(checkpoints, tmp_path, image_file):
    """``export``, then ``count`` and ``load`` with the folder, as if it were a checkpoint."""
    out = tmp_path / "export"
    arguments = ["--model", str(checkpoints / "audiocsrnet"), "--precision", "bf16", "--exits", "V1,AV2", "--out"]
    done = CliRunner().invoke(app, ["export", *arguments, str(out)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{out}: {sum(path.is_file() for path in out.rglob('*'))} files, ")
    counter = load(out)
    assert counter.chain.runtime == "openvino, bf16, exported"
    expected = by_eager(checkpoints / "audiocsrnet", IMAGE, AUDIO)
    result = {r.exit: r for r in counter.stream(IMAGE, AUDIO)}
    assert list(result) == ["V1", "AV2", "final"]
    for name, counts in result.items():
        assert counts.count == pytest.approx(expected[name], rel=0.02)
    assert float(result["final"].density.sum()) == pytest.approx(result["final"].count, rel=0.01)
    rows = CliRunner().invoke(app, ["count", str(image_file()), "--model", str(out), "--format", "json"])
    assert rows.exit_code == 0, rows.output
    assert [e["exit"] for e in json.loads(rows.stdout)["exits"]] == ["V1", "AV2", "final"]
    with pytest.raises(ExportError, match="runs on what it was exported for"):
        load(out, runtime="eager")


def test_a_classifier_is_exported_and_does_not_count(checkpoints, tmp_path):
    out = export(checkpoints / "classifier", tmp_path / "classes")
    exported = Exported(out)
    with pytest.raises(ExportError, match="resnet18 is a classifier"):
        exported.count(IMAGE)
    network = networks.made("classifier")
    features = networks.batch(network, 2)
    state = {"visual": features.visual.numpy()}
    for index in range(3):
        state = exported.chain.advance(index, state)
    scores = exported.chain.run_exit("final", state).value
    expected = dict(Eager().ready(network).stream(features))["final"].value.numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_a_classifier_keeps_its_temperatures(checkpoints, tmp_path):
    """Those of the checkpoint come along; others can be fitted on the export itself."""
    source, *_ = (folder for folder in checkpoints.iterdir() if folder.name == "classifier")
    path = tmp_path / "model.safetensors"
    path.write_bytes((source / "model.safetensors").read_bytes())
    zoo.annotate(path, temperatures=Temperatures({"final": 2.5}, 20).to_dict())
    out = export(path, tmp_path / "classes")
    _, spec, _ = open_model(out)
    assert Temperatures.from_dict(spec.meta["temperatures"]).by_exit == {"final": 2.5}
    assert keep_calibration(out, temperatures=Temperatures({"final": 3.5}, 20)) == out
    _, spec, _ = open_model(out)
    assert Temperatures.from_dict(spec.meta["temperatures"]).by_exit == {"final": 3.5}


def test_the_own_size_changes_nothing(checkpoints, tmp_path):
    """Named, it is the size that it has: all exits and intervals stay."""
    path = tmp_path / "model.safetensors"
    path.write_bytes((checkpoints / "audiocsrnet" / "model.safetensors").read_bytes())
    network, _ = zoo.load(path)
    widths = dict.fromkeys(network.exit_names, 0.5)
    zoo.annotate(path, intervals=Intervals(0.9, widths, widths, 20).to_dict())
    width, height = network.config.size
    out = export(path, tmp_path / "same", size=f"{width}x{height}")
    manifest = read_manifest(out)
    assert list(manifest.exits) == network.exit_names
    assert manifest.intervals["silent"] == widths


def test_another_size(checkpoints, tmp_path):
    """Without branches AudioCSRNet sees at any size; with them the line says which cannot come along."""
    source = checkpoints / "audiocsrnet"
    out = export(source, tmp_path / "large", size="192x128", exits=["final"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["size"] == manifest["scene"] == [192, 128]
    assert list(manifest["exits"]) == ["final"]
    network, spec = zoo.load(source)
    network, spec = zoo.at_size(*zoo.with_exits(network, spec, []), (192, 128))
    expected = next(CrowdCounter(network, "large", runtime=Eager()).stream(IMAGE))
    assert Exported(out).count(IMAGE).count == pytest.approx(expected.count, rel=1e-4)
    with pytest.raises(
        zoo.ZooError, match=r"at 192x128: only at its own size there is V1, .*AV2-cnn \(leave early exits out"
    ):
        export(source, tmp_path / "more", size="192x128")
    with pytest.raises(zoo.ZooError, match="multiples of 64"):
        export(source, tmp_path / "more", size="100x100")
    with pytest.raises(zoo.ZooError, match="multiples of 8"):
        export(source, tmp_path / "more", size="100x100", exits=["final"])
    odd = export(source, tmp_path / "odd", size="200x104", exits=["final"])
    network, spec = zoo.at_size(*zoo.with_exits(*zoo.load(source), []), (200, 104))
    expected = next(CrowdCounter(network, "odd", runtime=Eager()).stream(IMAGE))
    assert Exported(odd).count(IMAGE).count == pytest.approx(expected.count, rel=1e-4)


def test_exits_with_strange_names(tmp_path):
    """A name is no path."""
    spec = zoo.Spec("audiocsrnet-s", (zoo.ExitSpec("V/1 é", "V1", "cnn"),), networks.SPECS["audiocsrnet"].changes)
    torch.manual_seed(0)
    network = networks.settled(zoo.build(spec))
    zoo.save(network, spec, tmp_path / "m" / "model.safetensors")
    out = export(tmp_path / "m", tmp_path / "export")
    assert {path.parent for path in tmp_path.rglob("*.xml")} == {out}
    assert list(counts_of(Exported(out), IMAGE)) == ["V/1 é", "final"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--format", "onnx", "--precision", "int8"], "ONNX is written in fp32; int8 is for OpenVINO"),
        (["--calibrate", "crowd.h5"], "--calibrate crowd.h5: only int8 is calibrated"),
        (["--precision", "int8", "--calibrate", "crowd.h5"], "crowd.h5: no such prepared file"),
        (["--precision", "int8"], "the checkpoint has no activation ranges for int8"),
        (["--precision", "int8", "--split", "val"], "--split val: of which file? Name it with --calibrate"),
        (["--exits", "V9"], "no early exit 'V9' in audiocsrnet-s"),
        (["--size", "big"], "size 'big': expected width and height like 1024x576"),
        (["--model", "nothing"], "nothing: neither a model's name"),
        (["--precision", "fp8"], "'fp8' is not one of 'fp32', 'bf16', 'int8'"),
    ],
)
def test_what_cannot_be_exported(options, line, checkpoints, tmp_path, capsys):
    arguments = ["export", "--model", str(checkpoints / "audiocsrnet"), "--out", str(tmp_path / "out"), *options]
    assert command.run(app, arguments) == 2
    assert line in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_stays(exported, checkpoints):
    before = {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}
    with pytest.raises(ExportError, match="already exists"):
        export(checkpoints / "audiocsrnet", exported)
    assert before == {path: path.read_bytes() for path in exported.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"library": "openvino"}, openvino, "convert"),
        ({"library": "onnx"}, torch.onnx, "export"),
        ({}, openvino_library, "save_model"),
    ],
    ids=["conversion", "torch.onnx", "saving"],
)
def test_an_export_that_fails_is_one_line_and_leaves_nothing(options, where, what, checkpoints, tmp_path, monkeypatch):
    def fails(*arguments, **_):
        for path in arguments[1:2]:  # a save that fails half-way
            if isinstance(path, Path):
                path.write_bytes(b"half")
        raise RuntimeError("Check 'it' failed:\nit cannot be done")

    monkeypatch.setattr(where, what, fails)
    with pytest.raises(ExportError, match=r"^audiocsrnet-s cannot be exported: it cannot be done$"):
        export(checkpoints / "audiocsrnet", tmp_path / "out", exits=[], **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_an_export_that_cannot_be_written(checkpoints, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written"):
        export(checkpoints / "audiocsrnet", tmp_path / "file" / "out", exits=[])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_shipped_name_is_the_shipped_model(exported, monkeypatch, tmp_path):
    """Whatever folder of that name lies in the working directory."""
    monkeypatch.chdir(tmp_path)
    shipped = zoo.shipped()[0]
    copied(exported, tmp_path / shipped)
    _, _, runtime = open_model(shipped, "eager")
    assert runtime.name == "eager"
    _, _, runtime = open_model(f"./{shipped}")
    assert runtime.name == "openvino, fp32, exported"


def resealed(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with the checksum of what stands in it."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    manifest["checksum"] = checksum(json.dumps(rest, sort_keys=True).encode())
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_another_number_in_the_manifest_is_damage(exported, tmp_path, capsys, image_file):
    folder = copied(exported, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["made_with"]["torch"] = "2.99"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, "manifest.json: damaged (its checksum does not match)", capsys, image_file())


def test_a_full_disk_is_one_line_whatever_the_library_says(checkpoints, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        monkeypatch.setattr("crowdexit.utils.files.free_bytes", lambda _: 0)
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("crowdexit.export.writer._save", full)
    with pytest.raises(ExportError) as error:
        export(checkpoints / "audiocsrnet", tmp_path / "out")
    assert str(error.value).startswith(f"{tmp_path / 'out'}: the disk is full (")
    assert str(error.value).endswith(f"free in {tmp_path}); nothing is written")
    assert not list(tmp_path.iterdir())


def test_nothing_is_converted_for_a_disk_without_room(checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr("crowdexit.utils.files.free_bytes", lambda _: 1000)
    monkeypatch.setattr("crowdexit.export.writer.partition", lambda _: pytest.fail("converted"))
    with pytest.raises(ExportError, match=r"the disk is full \(\d.* needed, 1\.0 kB free in .*; nothing is written$"):
        export(checkpoints / "audiocsrnet", tmp_path / "out")


def changed(manifest: Any, path: str, value: object) -> None:
    *keys, last = (int(key) if key.isdigit() else key for key in path.split("/"))
    for key in keys:
        manifest = manifest[key]
    manifest[last] = value


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("format", "crowdexit-export-9", "of another version"),
        ("size", [0, 64], "size.0"),
        ("size", [10**9, 64], "size.0"),
        ("view", "aside", "view"),
        ("mean", [0.5, 0.5, 0.5], "normalised in another way"),
        ("exits/final", 10**9, "exits.final"),
        ("exits/other", 1, "do not belong together"),
        ("pieces/stage-0/files", ["../../secret.xml"], "pieces.stage-0.files.0"),
        ("pieces/stage-0/files", ["/etc/passwd"], "pieces.stage-0.files.0"),
        ("pieces/stage-0/files", [".hidden"], "pieces.stage-0.files.0"),
        ("pieces/stage-0/files", ["exit-AV1.xml", "exit-AV1.bin"], "do not belong together"),
        ("size", [192, 64], "stage-0 takes visual, which nothing before it outputs"),
        ("exits", {"final": 3, "AV1": 1}, "its exits are not in the order in which they answer"),
        ("exits", {"AV1": 2, "final": 3}, "describes another network than its models are (exits)"),
        ("scene", [256, 128], "describes another network than its models are (scene)"),
        ("view", "tiles", "describes another network than its models are (view)"),
        ("step", 16, "describes another network than its models are (step)"),
        ("classifies", True, "describes another network than its models are (classifies)"),
        ("network/changes/size", [128, 128], "describes another network than its models are (size)"),
        ("pieces/stage-0/takes/0/name", "picture", "stage-0 has the tensors picture, expected some of visual, log_mel"),
        ("pieces/stage-0/gives/0/name", "seen", "stage-0 has the tensors seen, expected some of visual, log_mel"),
        ("pieces/stage-0/gives/0/name", "audio", "exit-AV1 takes visual, which nothing before it outputs"),
        ("pieces/stage-0/gives/0/shape", [1, 2, 3], "exit-AV1 takes visual, which nothing before it outputs"),
        ("pieces/stage-1/takes/1/dtype", "float32", "stage-1 takes has_audio, which nothing before it outputs"),
        ("pieces/stage-1/gives", [], "exit-AV1 takes audio, which nothing before it outputs"),
        ("pieces/exit-final/gives/0/name", "count", "exit-final has the tensors count, density"),
        ("pieces/exit-final/gives", [], "exit-final outputs no value"),
        ("files/stage-0.xml/bytes", 2**40, "too large"),
        ("files/stage-0.xml/sha256", "0" * 64, "its SHA-256 is not the manifest's"),
        ("files/stage-0.xml/sha256", "zero", "sha256"),
        ("extra", 1, "extra"),
    ],
)
def test_a_manifest_is_not_trusted(path, value, line, exported, tmp_path, capsys, image_file):
    folder = copied(exported, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    changed(manifest, path, value)
    resealed(folder, manifest)
    refused(folder, line, capsys, image_file())


@pytest.mark.parametrize("piece", ["stage-2", "exit-AV1", "exit-final"])
@pytest.mark.parametrize("side", ["takes", "gives"])
def test_ports_in_another_order_or_twice_are_not_trusted(piece, side, exported, tmp_path, capsys, image_file):
    """They are those of the model's arrays: two of one shape would be taken for each other."""
    folder = copied(exported, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    ports = manifest["pieces"][piece][side]
    ports.append(ports[0] if len(ports) == 1 else ports.pop(0))
    resealed(folder, manifest)
    refused(folder, "in that order", capsys, image_file())


def test_ports_that_the_model_has_not_are_one_line(exported, tmp_path, capsys, image_file):
    folder = copied(exported, tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["pieces"]["exit-final"]["gives"][1]
    resealed(folder, manifest)
    refused(folder, "exit-final returns 2 arrays, not 1", capsys, image_file())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", '{"format": "crowdexit-export-1"}', " " * 2**23])
def test_a_damaged_manifest(text, exported, tmp_path, capsys, image_file):
    folder = copied(exported, tmp_path / "copy")
    (folder / "manifest.json").write_text(text)
    refused(folder, "manifest.json", capsys, image_file())


def test_damaged_and_missing_models(exported, tmp_path, capsys, image_file):
    image = image_file()
    folder = copied(exported, tmp_path / "copy")
    weights = folder / "stage-0.bin"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    refused(folder, "stage-0.bin: damaged (its SHA-256 is not the manifest's)", capsys, image)
    weights.write_bytes(good[:-1])
    refused(folder, f"stage-0.bin: damaged (it has {len(good) - 1} bytes, not {len(good)})", capsys, image)
    weights.unlink()
    refused(folder, "stage-0.bin: cannot be read (No such file or directory)", capsys, image)
    # What is not a model although the manifest swears to it is refused by the library, in one line.
    words = b"these are words" * 100
    weights.write_bytes(good)
    (folder / "stage-0.xml").write_bytes(words)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["stage-0.xml"] = {"bytes": len(words), "sha256": hashlib.sha256(words).hexdigest()}
    resealed(folder, manifest)
    refused(folder, "OpenVINO cannot compile stage-0: ", capsys, image)


def test_bad_requests(exported):
    opened = Exported(exported)
    for request, line in [
        ({"image": IMAGE, "exits": ["V7"]}, r"no exit 'V7' in this export \(it has AV1, final\)"),
        ({"image": IMAGE, "audio": np.zeros((64, 96), np.float32)}, r"\(96, 64\)"),
        ({"image": "nowhere.jpg"}, "nowhere.jpg: no such file"),
        ({"image": IMAGE / 255}, r"H×W×3 \(RGB\) or H×W \(grey\) of uint8"),
        ({"image": IMAGE[:31]}, "too small"),
    ]:
        with pytest.raises(CrowdExitError, match=line):
            opened.count(**request)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def refused(folder: Path, line: str, capsys, image: Path) -> None:
    """The command ends with 2 and one line."""
    assert command.run(app, ["count", str(image), "--model", str(folder)]) == 2
    counts = capsys.readouterr().err
    assert line in counts
    assert counts.startswith("error: ")
    assert counts.count("\n") == 1
