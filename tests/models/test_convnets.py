"""The SL-ViT paper's classifiers: equal to torchvision's for the same weights, and cut at the paper's places."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model
from torchvision.models.resnet import Bottleneck

from crowdexit.models.backbones.convnets import ConvNet, ConvNetConfig
from crowdexit.models.backbones.weights import WeightsError, load_published
from crowdexit.models.stages import inputs

SMALL = {"resnet18": 64, "resnet50": 64, "densenet121": 64, "inception_v3": 107}


def network(architecture: str, **changes) -> ConvNet:
    torch.manual_seed(0)
    side = SMALL[architecture]
    settings = {"size": (side, side), "stride": "middle", "top": 0, "outputs": 7, "dim": 8, "heads": 2, **changes}
    return ConvNet(ConvNetConfig(architecture, **settings)).eval()


def theirs(architecture: str) -> nn.Module:
    """torchvision's model, no weight or running statistic at a value that hides a mistake."""
    torch.manual_seed(1)
    extra = {"transform_input": True, "init_weights": False} if architecture == "inception_v3" else {}
    model = get_model(architecture, weights=None, num_classes=7, **extra).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and tensor.dim() == 1:
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model


def older(key: str) -> str:
    """A key of DenseNet as the published files have it."""
    for part in ("norm", "conv"):
        for number in "12":
            key = key.replace(f".{part}{number}.", f".{part}.{number}.") if "denselayer" in key else key
    return key


@pytest.mark.parametrize("architecture", SMALL)
def test_torchvisions_weights_give_torchvisions_scores(architecture, tmp_path):
    model = theirs(architecture)
    tensors = {older(key): tensor.clone() for key, tensor in model.state_dict().items()}
    save_file(tensors, tmp_path / "published.safetensors")
    ours = network(architecture)
    filled = load_published(ours, "imagenet", tmp_path / "published.safetensors")
    image = torch.randn(2, 3, SMALL[architecture], SMALL[architecture])
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs(image))["final"].value, model(image), rtol=1e-4, atol=1e-5)
    unused = [key for key in filled.unused if not key.startswith("AuxLogits.")]
    assert all(key.endswith("num_batches_tracked") for key in unused)


def test_the_papers_stride_differs_from_torchvisions_only_in_where_a_stage_halves_its_map(tmp_path):
    model = theirs("resnet50")
    for block in (module for module in model.modules() if isinstance(module, Bottleneck)):
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)
    ours = network("resnet50", stride="first")
    ours.load_state_dict(
        {
            name: model.state_dict()[ours.published.get(name, name.replace("final.layers.0", "fc"))]
            for name in ours.state_dict()
        }
    )
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(inputs(image))["final"].value, model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "stride", "first", "second"),
    [
        ("resnet152", "first", (128, 28, 28), (512, 28, 28)),
        ("resnet152", "middle", (128, 28, 28), (512, 28, 28)),
        ("resnet18", "first", (128, 28, 28), (128, 28, 28)),
        ("densenet201", "first", (128, 28, 28), (256, 28, 28)),
        ("inception_v3", "first", (288, 25, 25), (288, 25, 25)),
    ],
)
def test_branches_stand_on_the_papers_maps(architecture, stride, first, second):
    with torch.device("meta"):
        net = ConvNet(ConvNetConfig(architecture, stride=stride))
    features = inputs(torch.empty(1, 3, 224, 224, device="meta"))
    for stage, expected in zip(net.stages, (first, second), strict=False):
        features = stage(features)
        assert features.visual.shape == (1, *expected)


def test_the_convolutions_up_to_a_branch_are_the_papers_in_number():
    """The 12th and the 36th of ResNet152, shortcuts counted."""
    with torch.device("meta"):
        net = ConvNet(ConvNetConfig("resnet152"))
    each = [sum(isinstance(module, nn.Conv2d) for module in stage.modules()) for stage in net.stages]
    assert each[0] == 12
    assert each[0] + each[1] == 36


@pytest.mark.parametrize("architecture", ["resnet18", "densenet121"])
@pytest.mark.parametrize("kind", ["cnn", "slvit"])
def test_gradients_reach_all_of_a_branch_and_what_stands_before_it(architecture, kind):
    net = network(architecture, dropout=0.0).train()
    for place in net.places:
        net.add_branch(f"{place}-{kind}", place, kind)
    answers = net(inputs(torch.randn(3, 3, 64, 64)), ["1-" + kind, "2-" + kind])
    assert all(answer.value.shape == (3, 7) for answer in answers.values())
    answers["2-" + kind].value.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.branches["2-" + kind].parameters())
    assert all(p.grad is not None for stage in net.stages[:2] for p in stage.parameters())
    assert all(p.grad is None for p in net.stages[2].parameters())


def test_batch_equals_single_images():
    net = network("resnet18")
    net.add_branch("1", "1", "slvit")
    net.eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        together = net(inputs(images))
        for i in range(3):
            alone = net(inputs(images[i : i + 1]))
            for name, answer in alone.items():
                torch.testing.assert_close(answer.value[0], together[name].value[i], rtol=1e-4, atol=1e-5)


def test_torchvisions_weights_are_refused_where_the_stride_is_the_papers(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="stride: middle"):
        load_published(network("resnet50", stride="first"), "imagenet", tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match="it lacks"):
        load_published(network("resnet18"), "imagenet", tmp_path / "w.safetensors")


def test_a_fetch_that_fails_says_what_to_do(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fail)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(WeightsError, match="resnet18: torchvision could not fetch its weights"):
        load_published(network("resnet18"), "imagenet", "torchvision")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet20"}, "no architecture 'resnet20'"),
        ({"stride": "last"}, "stride 'last'"),
        ({"size": (16, 64)}, "32 at least"),
        ({"architecture": "inception_v3", "size": (64, 64)}, "75 at least"),
    ],
)
def test_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        ConvNetConfig(**changes)
