"""A network that takes images of any size lays each out in its own shape, and counts the same whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import settled
from PIL import Image

from crowdexit.data.views import scale_down, scaled_size, views
from crowdexit.export.runner import Exported
from crowdexit.export.writer import export
from crowdexit.inference import collate
from crowdexit.inference.counter import CrowdCounter
from crowdexit.models import zoo
from crowdexit.models.network import MultiExitNetwork
from crowdexit.runtimes import openvino
from crowdexit.runtimes.batch import batch_of
from crowdexit.runtimes.eager import Eager
from crowdexit.runtimes.engines import OpenVINOEngine
from crowdexit.runtimes.openvino import OpenVINO

SIZE = (128, 96)  # of no more than so many pixels is an image
SPEC = zoo.Spec(
    "audiocsrnet-lite",
    (
        zoo.ExitSpec("V0", "V0", "density", {"density_context": [4, 6, 6]}),
        zoo.ExitSpec("AV1", "AV1", "density"),
    ),
    {"size": SIZE, "audio_features": 4, "fusion_channels": [8, 8, 4]},
)


@pytest.fixture(scope="module")
def network() -> MultiExitNetwork:
    torch.manual_seed(5)
    network = settled(zoo.build(SPEC))
    torch.nn.init.normal_(network.branches["V0"].context.out.weight)
    return network


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    """Smaller and larger than the network's size, and two of one shape."""
    random = np.random.default_rng(0)
    shapes = ((96, 128), (96, 128), (40, 70), (200, 90), (300, 420))
    return [random.integers(0, 255, (*shape, 3), np.uint8) for shape in shapes]


@pytest.mark.parametrize(
    ("width", "height", "wanted"),
    [(1024, 768, (1024, 768)), (640, 480, (640, 480)), (1920, 1080, (1182, 665)), (100, 7864, (100, 7864))],
)
def test_an_image_is_scaled_down_to_the_pixels_and_never_up(width, height, wanted):
    assert scaled_size(width, height, (1024, 768)) == wanted


def test_the_canvas_ends_at_the_next_multiple_of_32(images):
    canvas, placement = scale_down(images[2], SIZE)
    assert canvas.shape == (64, 96, 3)
    assert (placement.scale, placement.offset, placement.size) == (1.0, (0, 0), (70, 40))
    np.testing.assert_array_equal(canvas[:40, :70], images[2])
    valid = placement.valid_mask((96, 64))
    assert valid.sum() == pytest.approx(70 * 40 / 64)  # in cells of 8×8


def test_padding_adds_nobody(network, images):
    """Every cell that is padding counts for nothing, whatever the network says of it."""
    counter = CrowdCounter(network, "lite", runtime=Eager())
    for result in counter.stream(images[2]):
        assert result.density is not None
        assert result.density.shape == (5, 9)
        assert result.count == pytest.approx(float(result.density.sum()), rel=1e-5)


def test_the_batch_does_not_matter(network, images):
    counter = CrowdCounter(network, "lite", runtime=Eager())
    alone = [counter.count(image).count for image in images]
    assert len({round(count, 3) for count in alone}) == len(images)
    together = [result.count for result in counter.count_many([(image, None) for image in images]) if result]
    assert together == pytest.approx(alone, rel=1e-5)


def test_openvino_is_converted_once_for_all_sizes(network, images, monkeypatch):
    converted = []
    convert = openvino.convert
    monkeypatch.setattr(openvino, "convert", lambda piece, *of: converted.append(piece) or convert(piece, *of))
    monkeypatch.setattr("crowdexit.runtimes.model_cache.cache_folder", lambda: None)
    chain, eager = OpenVINO().ready(network), Eager().ready(network)
    before = 0
    for image in images[1:4]:
        features = batch_of(views(image, SIZE, "scale"), [None])
        expected = {name: answer.value for name, answer in eager.stream(features)}
        for name, answer in chain.stream(features):
            torch.testing.assert_close(answer.value, expected[name], rtol=1e-4, atol=1e-4)
        before = before or len(converted)
    assert before > 0


@pytest.mark.parametrize("library", ["openvino", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_export_takes_any_size(network, images, library, tmp_path):
    path = tmp_path / "model.safetensors"
    zoo.save(network, SPEC, path)
    exported = Exported(export(path, tmp_path / "out", library=library, exits=["V0"]))
    counter = CrowdCounter(network, "lite", runtime=Eager(), exits=["V0", "final"])
    for image in images[1:4]:
        expected = {result.exit: result.count for result in counter.stream(image)}
        assert {result.exit: result.count for result in exported.stream(image)} == pytest.approx(expected, rel=1e-3)


def test_exits_whose_weights_belong_to_positions_are_refused():
    with pytest.raises(zoo.ZooError, match="no branch of kind 'cnn' fits"):
        zoo.build(zoo.Spec("audiocsrnet-lite", (zoo.ExitSpec("V1", "V1", "cnn"),)))
    with pytest.raises(zoo.ZooError, match="view 'fit'"):
        zoo.build(zoo.Spec("audiocsrnet-lite", (), {"regressor": True}))
    fitted = zoo.Spec("audiocsrnet-lite", (zoo.ExitSpec("V1", "V1", "slvit"),), {"view": "fit"})
    assert zoo.build(fitted).exit_names == ["V1", "final"]


def test_an_unknown_front_is_named():
    with pytest.raises(zoo.ZooError, match=r"no front 'vgg17' \(there are .*vgg16"):
        zoo.build(zoo.Spec("audiocsrnet", (), {"front": "vgg17"}))


def test_no_latency_has_the_compiling_of_another_size(network, monkeypatch, tmp_path):
    """An image of its own shape is compiled for before it is read, a file by its header."""
    done: list[str] = []
    ready, prepared = OpenVINOEngine._ready, collate.prepared
    monkeypatch.setattr(OpenVINOEngine, "_ready", lambda *given: done.append("compiled") or ready(*given))
    monkeypatch.setattr(collate, "prepared", lambda *given: done.append("read") or prepared(*given))
    counter = CrowdCounter(network, "tiny", runtime=OpenVINO(), warm=False)
    assert done == []
    Image.new("RGB", (70, 100)).save(tmp_path / "tall.png")
    assert len(counter.count(tmp_path / "tall.png").exits) == 3
    assert done[-1] == "read"
    compiled = len(done) - 1
    list(counter.stream(np.zeros((100, 70, 3), np.uint8)))
    assert done[compiled:] == ["read", "read"]
