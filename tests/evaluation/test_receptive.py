"""What a branch sees: a convolution a patch of the image, attention all of it."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from crowdexit.cli.main import app
from crowdexit.errors import CrowdExitError
from crowdexit.evaluation.receptive import receptive_fields
from crowdexit.models import zoo
from crowdexit.models.backbones.audiocsrnet import AudioCSRNet, AudioCSRNetConfig

CHANGES = {"size": [256, 128], "width": 1 / 16, "audio_width": 1 / 16, "patch": 4, "dim": 8, "heads": 2, "hidden": 8}
EXITS = (zoo.ExitSpec("V1", "V1", "slvit"), zoo.ExitSpec("V1-cnn", "V1", "cnn"), zoo.ExitSpec("AV1", "AV1", "slvit"))


@pytest.fixture
def network() -> AudioCSRNet:
    torch.manual_seed(0)
    made = zoo.build(zoo.Spec("audiocsrnet", EXITS, CHANGES))
    assert isinstance(made, AudioCSRNet)
    return made


@pytest.fixture
def make_image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (128, 256, 3), np.uint8)


def test_a_convolution_sees_a_patch_and_attention_everything(network, make_image):
    sights = {sight.exit: sight for sight in receptive_fields(network, make_image)}
    assert set(sights) == {"V1", "V1-cnn", "AV1"}
    cnn, slvit = sights["V1-cnn"], sights["V1"]
    assert cnn.field.shape == slvit.field.shape == (128, 256)
    assert (cnn.field[:, :40] == 0).all()  # pooled cells of 4×4, 3×3 before, and what the front's convolutions reach
    assert (cnn.field[:, -40:] == 0).all()
    assert cnn.field.max() == slvit.field.max() == 1
    assert (slvit.field[:, :40] > 0).any()
    assert (slvit.field[:, -40:] > 0).any()
    assert cnn.wide < slvit.wide <= 0.9
    assert cnn.attention is None


def test_attention_is_by_patch_and_adds_up(network, make_image):
    for name in ("V1", "AV1"):
        (sight,) = receptive_fields(network, make_image, [name])
        assert sight.attention is not None
        assert sight.attention.shape == (4, 8)  # the audio's patch is none of the image's
        assert sight.attention.sum() == pytest.approx(1, abs=1e-5)


def test_attention_weights_are_those_that_the_branch_uses():
    network = AudioCSRNet(AudioCSRNetConfig(**{**CHANGES, "size": (256, 128)}))  # type: ignore[arg-type]
    network.add_branch("V1", "V1", "slvit")
    attention = network.exit_module("V1").encoder.attention  # type: ignore[union-attr]
    tokens = torch.randn(2, 5, 8)
    weights = attention.weights(tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
    values = attention._asked(tokens)[2]
    expected = attention.proj((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(tokens), expected, rtol=1e-4, atol=1e-5)


def test_the_command(network, make_image, tmp_path):
    cv2.imwrite(str(tmp_path / "street.png"), make_image)
    zoo.save(network, zoo.Spec("audiocsrnet", EXITS, CHANGES), tmp_path / "model.safetensors")
    arguments = ["visualize", str(tmp_path / "street.png"), "--model", str(tmp_path / "model.safetensors")]
    result = CliRunner().invoke(app, [*arguments, "--exits", "V1,V1-cnn", "--out", str(tmp_path / "see.png")])
    assert result.exit_code == 0, result.output
    assert "V1-cnn" in result.output
    drawn = cv2.imread(str(tmp_path / "see.png"))
    assert drawn is not None
    assert drawn.std() > 10


@pytest.mark.parametrize(("exits", "message"), [(["V2"], "no early exit 'V2'"), (["final"], "no early exit 'final'")])
def test_no_such_exit(network, make_image, exits, message):
    with pytest.raises(CrowdExitError, match=message):
        receptive_fields(network, make_image, exits)


def test_a_model_without_branches(make_image):
    with pytest.raises(CrowdExitError, match="no early exits"):
        receptive_fields(zoo.build(zoo.Spec("audiocsrnet", (), CHANGES)), make_image)
