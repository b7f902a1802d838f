"""A transformer counts an image in tiles, or fitted into one view; the counts add up whatever the batch."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from crowdexit.data.views import tiles, views
from crowdexit.errors import CrowdExitError
from crowdexit.inference.counter import CrowdCounter
from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions
from crowdexit.models import zoo
from crowdexit.runtimes.batch import batch_of
from crowdexit.runtimes.eager import Eager

VIT = {"size": [64, 64], "dim": 12, "depth": 3, "heads": 2, "hidden": 8, "slvit_dim": 4, "audio_width": 0.0625}
EXITS = (zoo.ExitSpec("1-mlp", "1", "mlp"), zoo.ExitSpec("2-heard", "2", "slvit-audio"))


def made(view: str) -> CrowdCounter:
    torch.manual_seed(0)
    spec = zoo.Spec("transcrowd-token-s", EXITS, {**VIT, "view": view})
    network = zoo.build(spec)
    for name in ("1-mlp", "2-heard"):
        torch.nn.init.constant_(network.branches[name].head[-1].bias, 0.3)
    torch.nn.init.constant_(network.final.layers[-1].bias, 1.0)
    return CrowdCounter(network, spec.model, runtime=Eager())


@pytest.fixture
def images():
    random = np.random.default_rng(0)
    return [random.integers(0, 255, shape, np.uint8) for shape in ((96, 128, 3), (128, 96, 3), (64, 64, 3))]


@pytest.fixture
def audio():
    return np.random.default_rng(1).normal(size=(96, 64)).astype(np.float32)


def test_tiles_are_added(images, audio):
    counter = made("tiles")
    assert counter.size == (192, 128)
    result = {r.exit: r for r in counter.stream(images[0], audio)}
    assert list(result) == ["1-mlp", "2-heard", "final"]
    alone = dict.fromkeys(result, 0.0)
    for tile in tiles(images[0], (64, 64)):
        one = views(tile, (64, 64), "fit")
        with torch.inference_mode():
            for name, answer in counter.network.stream(batch_of(one, [audio])):
                alone[name] += float(answer.value)
    for name, value in alone.items():
        assert result[name].count == pytest.approx(value, rel=1e-4)
        assert result[name].density is None


@pytest.mark.parametrize("view", ["tiles", "fit"])
def test_the_batch_does_not_matter(view, images, audio):
    counter = made(view)
    log_mels = [audio, None, audio]
    pairs = list(zip(images, log_mels, strict=True))
    for together, (image, has_audio) in zip(counter.count_many(pairs), pairs, strict=True):
        alone = {result.exit: result.count for result in counter.stream(image, has_audio)}
        assert {result.exit: result.count for result in together.exits} == pytest.approx(alone, rel=1e-4)


def test_huge_image_is_cut_into_tiles(images):
    counter = made("tiles")
    huge = np.tile(images[0], (12, 12, 1))
    counts = {r.exit: r.count for r in counter.stream(huge)}
    assert counts["final"] > 2 * counter.count(images[0]).count


def test_no_density_of_a_network_without_a_map(tmp_path):
    image = tmp_path / "crowd.png"
    cv2.imwrite(str(image), np.zeros((96, 128, 3), np.uint8))
    with pytest.raises(CrowdExitError, match="transcrowd-token-s makes no map, it counts directly"):
        count_inputs(made("fit"), [image], CountOptions(density=tmp_path / "map.png"))
    assert list(tmp_path.iterdir()) == [image]
    assert count_inputs(made("fit"), [image], CountOptions(format="json", out=tmp_path / "rows.json")) == 1
