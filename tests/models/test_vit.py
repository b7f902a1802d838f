"""Vision transformers: equal to timm's and to TransCrowd's module tree for the same weights, and well cut."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

from crowdexit.data.views import normalise
from crowdexit.models.backbones.audiocsrnet import AudioCSRNet, AudioCSRNetConfig
from crowdexit.models.backbones.vit import ViT, ViTConfig
from crowdexit.models.backbones.weights import WeightsError, load_published
from crowdexit.models.stages import inputs

SMALL = {"size": (96, 96), "dim": 48, "depth": 4, "heads": 3, "hidden": 8, "slvit_dim": 4, "slvit_heads": 2}


def network(**changes) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig(**{**SMALL, **changes})).eval()


def shake(module: nn.Module) -> None:
    """No weight at a value that hides a mistake."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


class OfficialTransCrowd(VisionTransformer):
    """The module tree and the forward of TransCrowd's code, narrower."""

    def __init__(self, variant: str) -> None:
        norm = partial(nn.LayerNorm, eps=1e-6)
        super().__init__(img_size=96, embed_dim=48, depth=4, num_heads=3, norm_layer=norm, num_classes=1000)
        self.variant = variant
        last: list[nn.Module] = [nn.ReLU(), nn.Dropout(0.5), nn.Linear(1000, 1)]
        if variant == "gap":
            last = [nn.ReLU(), nn.Linear(36 * 48, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 1)]
        self.output1 = nn.Sequential(*last)

    def forward(self, x):
        x = self.forward_features(x)
        if self.variant == "token":
            return self.output1(self.head(x[:, 0]))
        return self.output1(F.adaptive_avg_pool1d(x[:, 1:], 48).flatten(1))


@pytest.mark.parametrize("variant", ["token", "gap"])
def test_a_published_transcrowd(variant, tmp_path):
    torch.manual_seed(1)
    official = OfficialTransCrowd(variant).eval()
    shake(official)
    torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in official.state_dict().items()}}, tmp_path / "m.pth"
    )
    ours = network(task=variant, count_scale=100.0)
    filled = load_published(ours, "transcrowd", tmp_path / "m.pth")
    assert set(filled.filled) == set(ours.state_dict())
    assert filled.unused == (("head.weight", "head.bias") if variant == "gap" else ())
    image = torch.randn(3, 3, 96, 96)
    with torch.inference_mode():
        got, wanted = ours(inputs(image))["final"].value, official(image).squeeze(1)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_timms_weights_and_deits_wrapping(tmp_path):
    timms = VisionTransformer(img_size=96, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    shake(timms)
    save_file(timms.state_dict(), tmp_path / "timm.safetensors")
    torch.save({"model": timms.state_dict()}, tmp_path / "deit.pth")
    image = torch.randn(2, 3, 96, 96)
    for file in ("timm.safetensors", "deit.pth"):
        ours = network(task="class", outputs=10)
        load_published(ours, "vit", tmp_path / file)
        with torch.inference_mode():
            torch.testing.assert_close(ours(inputs(image))["final"].value, timms(image), rtol=1e-4, atol=1e-4)
    # Other classes: the encoders alone. Another size: the positions resampled.
    other = network(task="class", outputs=7)
    assert not any(key.startswith("final.head") for key in load_published(other, "vit", tmp_path / "deit.pth").filled)
    wide = network(size=(160, 128))
    load_published(wide, "vit", tmp_path / "deit.pth")
    assert wide.stages[0].embedding.pos_embed.shape == (1, 81, 48)
    torch.testing.assert_close(wide.stages[0].embedding.pos_embed[:, 0], timms.pos_embed[:, 0])


def test_weights_of_another_normalisation(tmp_path):
    timms = VisionTransformer(img_size=96, embed_dim=48, depth=4, num_heads=3, num_classes=10).eval()
    shake(timms)
    save_file(timms.state_dict(), tmp_path / "timm.safetensors")
    ours = network(task="class", outputs=10)
    load_published(ours, "augreg", tmp_path / "timm.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    theirs = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    batch = torch.from_numpy(np.stack([normalise(image) for image in images]))
    with torch.inference_mode():
        torch.testing.assert_close(ours(inputs(batch))["final"].value, timms(theirs), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit(tmp_path):
    timms = VisionTransformer(img_size=96, embed_dim=48, depth=3, num_heads=3, num_classes=10)
    torch.save(timms.state_dict(), tmp_path / "m.pth")
    before = {k: v.clone() for k, v in network().state_dict().items()}
    ours = network()
    for kind, net, says in (
        ("vit", ours, r"lacks 'blocks.3"),
        ("transcrowd", network(depth=3), r"'head.weight' is 10×48, wanted 1000×48"),
        ("transcrowd", network(task="class", depth=3), "TransCrowd counts"),
        ("vit", network(dim=96), "wanted 96×3×16×16"),
        ("vit", network(stem="conv"), "stem of convolutions"),
        ("vgg16", ours, "not weights for this network, ViT"),
        (
            "vit",
            AudioCSRNet(AudioCSRNetConfig(size=(64, 64), width=1 / 64, audio_width=1 / 64)),
            "not weights for this network, AudioCSRNet",
        ),
    ):
        with pytest.raises(WeightsError, match=says):
            load_published(net, kind, tmp_path / "m.pth")
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("uses_audio", [False, True])
def test_every_kind_at_every_place(uses_audio):
    ours = network(audio_width=1 / 16 if uses_audio else 0.0)
    kinds = [
        "mlp",
        "cnn-ignore",
        "cnn-add",
        "cnn-project",
        "vit",
        "mixer",
        "resmlp",
        "slvit",
        "gmlp",
        "fnet",
        "perceiver",
    ]
    kinds += ["slvit-audio"] if uses_audio else []
    assert list(ours.places) == ["1", "2", "3"]
    for place in ours.places:
        assert set(ours.branch_kinds(place)) == set(kinds)
        for kind in kinds:
            ours.add_branch(f"{place}-{kind}", place, kind)
            assert ours.exit_module(f"{place}-{kind}").kind == kind
    ours.eval()
    features = inputs(torch.randn(2, 3, 96, 96), torch.randn(2, 1, 96, 64), torch.tensor([True, False]))
    answers = ours(features)
    assert len(answers) == 3 * len(kinds) + 1
    assert all(a.value.shape == (2,) and torch.isfinite(a.value).all() for a in answers.values())
    # Sound reaches the branches that hear, of the samples that are heard, and nothing else.
    other = ours(inputs(features.visual, torch.randn(2, 1, 96, 64), features.has_audio))
    for name in answers:
        changed = (answers[name].value != other[name].value).tolist()
        assert changed == [name.endswith("slvit-audio"), False], name


def test_stops_after_the_branchs_layer():
    ours = network()
    ours.add_branch("2-mlp", "2", "mlp")
    ours.eval()
    reached = []
    for index, stage in enumerate(ours.stages):
        stage.register_forward_hook(lambda *_, index=index: reached.append(index))
    features = inputs(torch.randn(1, 3, 96, 96))
    early = ours(features, ["2-mlp"])["2-mlp"].value
    assert reached == [0, 1]
    torch.testing.assert_close(ours(features)["2-mlp"].value, early)


def test_the_network_is_every_part_reached_by_the_gradient():
    ours = network(stem="conv")
    ours.train()
    ours(inputs(torch.randn(2, 3, 96, 96)))["final"].value.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in ours.parameters())


def test_not_a_shape():
    with pytest.raises(ValueError, match="multiples of 16"):
        ViTConfig(size=(100, 96))
    with pytest.raises(ValueError, match="5 heads do not divide 48"):
        ViTConfig(dim=48, heads=5)
    with pytest.raises(ValueError, match="one output"):
        ViTConfig(outputs=3)
    with pytest.raises(ValueError, match="no exit location '4' in this network"):
        network().add_branch("x", "4", "mlp")
    with pytest.raises(ValueError, match="no branch of kind 'slvit-audio' fits location 1"):
        network().add_branch("x", "1", "slvit-audio")
    with pytest.raises(ValueError, match="no branch of kind 'cnn' fits"):
        network().add_branch("x", "1", "cnn")
