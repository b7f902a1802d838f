"""Published weights: files of the true formats give the outputs of the networks that they come from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.vgg import cfgs, make_layers

from crowdexit.data.views import MEAN, STD
from crowdexit.models.backbones.audiocsrnet import FUSION_CHANNELS, AudioCSRNet, AudioCSRNetConfig
from crowdexit.models.backbones.vgg import VGG_FRONT, VGGISH, VGGish
from crowdexit.models.backbones.weights import WeightsError, apply_weights, load_published, read_published
from crowdexit.models.backbones.yamnet import BLOCKS
from crowdexit.models.stages import inputs

WIDTH = 16  # the small networks are as wide as the published ones / 16


def network(**changes) -> AudioCSRNet:
    config = AudioCSRNetConfig(size=(128, 64), width=1 / WIDTH, audio_width=1 / WIDTH)
    return AudioCSRNet(AudioCSRNetConfig(**{**config.to_dict(), **changes})).eval()


def narrow(layout) -> list[int | str]:
    return [item if item == "M" else item // WIDTH for item in layout]


def chain(layout, channels: int, dilation: int = 1, norm: bool = False) -> nn.Sequential:
    """Convolutions with ReLU as both published code bases chain them."""
    layers: list[nn.Module] = []
    for item in narrow(layout):
        if item == "M":
            layers.append(nn.MaxPool2d(2))
            continue
        layers.append(nn.Conv2d(channels, item, 3, padding=dilation, dilation=dilation))
        if norm:
            layers.append(nn.BatchNorm2d(item, affine=False))
        layers.append(nn.ReLU())
        channels = item
    return nn.Sequential(*layers)


class TorchVGGish(nn.Module):
    """The module tree of the published VGGish: ``features`` and ``embeddings``."""

    def __init__(self, top: str = "embeddings") -> None:
        super().__init__()
        self.features = chain(VGGISH, 1)
        self.add_module(top, nn.Sequential(nn.Linear(24 * 512 // WIDTH, 8), nn.ReLU(), nn.Linear(8, 8)))


class HuAudioCSRNet(nn.Module):
    """The module tree and the forward of Hu et al.'s code: image in their normalisation → map at full size."""

    def __init__(self) -> None:
        super().__init__()
        self.frontend = chain(VGG_FRONT, 3)
        self.backend = chain(FUSION_CHANNELS, 512 // WIDTH, dilation=2, norm=True)
        self.output_layer = nn.Conv2d(64 // WIDTH, 1, 1)
        self.audio_vgg = TorchVGGish(top="fc")
        self.fully_connected = nn.Sequential(*(nn.Linear(512 // WIDTH, 2 * c // WIDTH) for c in FUSION_CHANNELS))
        for name, buffer in self.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)

    def forward(self, image: Tensor, log_mel: Tensor) -> Tensor:
        x, audio = self.frontend(image), self.audio_vgg.features(log_mel).mean((2, 3))
        for i in range(6):
            conv, norm, relu = self.backend[3 * i : 3 * i + 3]
            gamma, beta = self.fully_connected[i](audio)[:, :, None, None].chunk(2, dim=1)
            x = relu(norm(conv(x)) * gamma + beta)
        return F.interpolate(self.output_layer(x), scale_factor=8)


def csrnet() -> dict[str, Tensor]:
    parts = {"frontend": chain(VGG_FRONT, 3), "backend": chain(FUSION_CHANNELS, 512 // WIDTH, dilation=2)}
    parts["output_layer"] = nn.Conv2d(64 // WIDTH, 1, 1)
    return nn.ModuleDict(parts).state_dict()


def vgg16(layout=None) -> dict[str, Tensor]:
    """The names of torchvision's file; its three dense layers shortened to one."""
    features = make_layers(layout or narrow(cfgs["D"]))
    return nn.ModuleDict({"features": features, "classifier": nn.Sequential(nn.Linear(4, 2))}).state_dict()


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[object], Path]:
    def save(content: object, name: str = "weights.pth") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def test_vgg16_is_torchvisions_front_at_full_width(saved):
    """The paper's own width, so that the numbers of the layers are held to the true file's."""
    state = vgg16(cfgs["D"])
    front = make_layers(cfgs["D"])[:23]
    front.load_state_dict(
        {k.removeprefix("features."): t for k, t in state.items() if k.startswith("features.")}, False
    )
    ours = AudioCSRNet(AudioCSRNetConfig(size=(128, 64))).eval()
    filled = load_published(ours, "vgg16", saved(state))
    assert len(filled.filled) == 20
    assert [k for k in filled.unused if k.startswith("features")] == [
        f"features.{n}.{part}" for n in (24, 26, 28) for part in ("weight", "bias")
    ]
    image = torch.randn(1, 3, 64, 64)
    out = ours.stages[0](inputs(image)).visual
    assert out.shape == (1, 512, 8, 8)
    torch.testing.assert_close(out, front(image))


@pytest.mark.parametrize("top", ["embeddings", "fc"])
def test_vggish(saved, top):
    source, ours = TorchVGGish(top), network()
    filled = load_published(ours, "vggish", saved(source.state_dict()))
    assert {f"features.{n}.weight" for n in (0, 3, 6, 8, 11, 13)} < set(source.state_dict())
    assert len(filled.filled) == 12
    assert all(k.startswith(top) for k in filled.unused)
    log_mel = torch.randn(2, 1, 96, 64)
    vggish = next(s for s in ours.stages if isinstance(s, VGGish))
    torch.testing.assert_close(vggish.embed(log_mel), source.features(log_mel).mean((2, 3)))


def test_csrnet_fills_the_front_and_reports_unused_weights(saved):
    state = csrnet()
    checkpoint = {"epoch": 3, "arch": "vgg16", "best_prec1": torch.tensor(66.4), "optimizer": {"state": {}}}
    path = saved({**checkpoint, "state_dict": {f"module.{k}": t for k, t in state.items()}}, "model_best.pth.tar")
    ours = network()
    others = {k: t.clone() for k, t in ours.state_dict().items() if not k.startswith("stages.0")}
    filled = load_published(ours, "csrnet", path)
    for key, tensor in state.items():
        if key.startswith("frontend."):
            assert torch.equal(ours.state_dict()["stages.0.layers." + key.removeprefix("frontend.")], tensor)
    assert set(filled.unused) == {k for k in state if not k.startswith("frontend.")}
    assert all(torch.equal(ours.state_dict()[k], t) for k, t in others.items())
    assert str(filled) == f"csrnet from {path}: 20 tensors filled, 14 unused"


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"net": s}, lambda s: {"state_dict": s}])
@pytest.mark.parametrize("prefix", ["", "CCN.", "CCN.module.", "module.CCN."])
def test_audiocsrnet_counts_as_its_source(saved, wrap, prefix):
    torch.manual_seed(0)
    source = HuAudioCSRNet().eval()
    ours = network(density_scale=10.0, image_norm="official")
    before = ours.stages[1].unheard.clone()
    filled = load_published(ours, "audiocsrnet", saved(wrap({prefix + k: t for k, t in source.state_dict().items()})))
    pixels, log_mel = torch.rand(2, 3, 64, 128), torch.randn(2, 1, 96, 64)
    mean = torch.tensor([0.410824894905, 0.370634973049, 0.359682112932])[:, None, None]
    std = torch.tensor([0.278580576181, 0.26925137639, 0.27156367898])[:, None, None]
    theirs = source((pixels - mean) / std, log_mel) / 100
    image = (pixels - torch.from_numpy(MEAN)[:, None, None]) / torch.from_numpy(STD)[:, None, None]
    answer = ours(inputs(image, log_mel))["final"]
    assert answer.value.abs().min() > 1e-3
    torch.testing.assert_close(answer.value, theirs.sum((1, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(answer.density, F.avg_pool2d(theirs, 8) * 64, rtol=1e-3, atol=1e-6)
    assert torch.equal(ours.stages[1].unheard, before)
    untouched = {k for k in ours.state_dict() if k not in filled.filled and not k.endswith("num_batches_tracked")}
    assert untouched == {"stages.1.unheard"}


def test_audiocsrnet_wants_its_own_normalisation(saved):
    """Folded into the first convolution it would be wrong where that pads."""
    path = saved(HuAudioCSRNet().state_dict())
    fails(lambda: load_published(network(), "audiocsrnet", path), "set changes: {image_norm: official}")
    with pytest.raises(ValueError, match="image_norm 'hu': 'imagenet' or 'official'"):
        network(image_norm="hu")


def test_several_files_in_order(saved):
    ours, vgg, audio, crowd = network(), vgg16(), TorchVGGish().state_dict(), csrnet()
    made = apply_weights(
        ours, {"vgg16": saved(vgg, "a"), "vggish": saved(audio, "b"), "csrnet": str(saved(crowd, "c"))}
    )
    assert [f.kind for f in made] == ["vgg16", "vggish", "csrnet"]
    assert torch.equal(ours.state_dict()["stages.1.layers.13.weight"], audio["features.13.weight"])
    assert torch.equal(ours.state_dict()["stages.0.layers.0.weight"], crowd["frontend.0.weight"])


def test_safetensors(tmp_path):
    state = {k: t.contiguous().half() for k, t in vgg16().items()}
    save_file(state, tmp_path / "vgg.safetensors")
    ours = network()
    load_published(ours, "vgg16", tmp_path / "vgg.safetensors")
    assert torch.equal(ours.state_dict()["stages.0.layers.21.bias"], state["features.21.bias"].float())


def test_torchvision_fetches_from_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = vgg16()
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    ours = network()
    assert load_published(ours, "vgg16", "torchvision").source == "torchvision"
    assert torch.equal(ours.state_dict()["stages.0.layers.0.weight"], state["features.0.weight"])


def test_torchvision_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    fails(lambda: load_published(network(), "vgg16", "torchvision"), "could not fetch")


class Shell:
    """What a malicious file holds: on unpickling it would run a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def fails(work: Callable[[], object], says: str) -> None:
    with pytest.raises(WeightsError) as error:
        work()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_nothing_is_unpickled(saved, tmp_path):
    path = saved({"state_dict": vgg16(), "extra": Shell(tmp_path / "ran")})
    fails(lambda: read_published(path), "would run code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_damaged_files(saved, share):
    path = saved(vgg16())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    fails(lambda: read_published(path), "not a file of weights, or a damaged one")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_other_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>not found</html>" * 100)
    fails(lambda: read_published(tmp_path / name), "not a file of weights, or a damaged one")


def test_no_file_and_nothing_in_it(saved, tmp_path):
    fails(lambda: read_published(tmp_path), "no such file")
    fails(lambda: read_published(saved({"epoch": 3})), "no weights in it")
    fails(lambda: read_published(saved([torch.zeros(2)])), "no weights in it")


def drop(state: dict[str, Tensor]) -> None:
    del state["features.19.bias"]


def widen(state: dict[str, Tensor]) -> None:
    state["features.10.weight"] = torch.zeros(2, 3, 3, 3)


def poison(state: dict[str, Tensor]) -> None:
    state["features.7.bias"][1] = float("nan")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop, "it lacks 'features.19.bias'"),
        (widen, "'features.10.weight' is 2×3×3×3, wanted 16×8×3×3"),
        (poison, "'features.7.bias' is not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_change_nothing(saved, spoil, says):
    state, ours = vgg16(), network()
    before = copy.deepcopy(ours.state_dict())
    spoil(state)
    fails(lambda: load_published(ours, "vgg16", saved(state)), says)
    assert all(torch.equal(t, before[k]) for k, t in ours.state_dict().items())


def test_wrong_kinds(saved):
    fails(lambda: load_published(network(), "resnet", "x"), "no published weights of kind 'resnet'")
    fails(lambda: load_published(network(), "csrnet", saved(vgg16())), "it lacks 'frontend.0.weight'")
    fails(lambda: load_published(network(), "vggish", saved(vgg16())), "'features.0.weight' is 4×3×3×3, wanted 4×1×3×3")
    fails(lambda: load_published(network(front_norm=True), "vgg16", saved(vgg16())), "batch normalisation")
    state = HuAudioCSRNet().state_dict()
    state["backend.1.weight"] = torch.ones(512 // WIDTH)
    ours = network(image_norm="official")
    fails(lambda: load_published(ours, "audiocsrnet", saved(state)), "it has 'backend.1.weight'")


LITE = {"front": "efficientnet-lite0", "audio_encoder": "yamnet", "fusion_channels": (8,) * 6, "view": "scale"}


def lite() -> AudioCSRNet:
    torch.manual_seed(0)
    return AudioCSRNet(AudioCSRNetConfig(size=(64, 64), audio_features=4, **LITE)).eval()


def scattered(tensor: Tensor) -> Tensor:
    """Running statistics and the like that are neither zero nor one."""
    return torch.rand_like(tensor) + 0.5


def test_efficientnet_lite0_is_timms(tmp_path):
    """The file at hand lacks the classifier; half of its layers stand in our second stage."""
    torch.manual_seed(1)
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = {k: scattered(t) if "running" in k else t for k, t in theirs.state_dict().items()}
    theirs.load_state_dict(state)
    file = {k: t.contiguous() for k, t in state.items() if not k.startswith("classifier")}
    save_file(file, tmp_path / "lite0.safetensors")
    ours = lite()
    filled = load_published(ours, "efficientnet-lite0", tmp_path / "lite0.safetensors")
    unused = {k for k in filled.unused if not k.endswith("num_batches_tracked")}
    assert {k.partition(".")[0] for k in unused} == {"conv_head", "bn2"}
    pixels = torch.randint(0, 256, (1, 3, 64, 96)).float()
    image = (pixels / 255 - torch.from_numpy(MEAN)[:, None, None]) / torch.from_numpy(STD)[:, None, None]
    x, maps = theirs.bn1(theirs.conv_stem((pixels - 127) / 128)), []
    for block in theirs.blocks:
        x = block(x)
        maps.append(x)
    stem, pyramid = ours.stages[0], ours.stages[1]
    at_8 = stem(inputs(image)).visual
    for own, wanted in ((at_8, maps[2]), (pyramid.to_16(at_8), maps[4]), (pyramid.to_32(maps[4]), maps[6])):
        torch.testing.assert_close(own, wanted, rtol=1e-3, atol=1e-4 * float(wanted.detach().abs().max()))


def yamnet_file() -> dict[str, Tensor]:
    """Random weights by the names of the published file: batch normalisation without scale."""
    torch.manual_seed(2)

    def norm(name: str, channels: int) -> dict[str, Tensor]:
        mean, var = 0.1 * torch.randn(channels), torch.rand(channels) + 0.5
        return {f"{name}.bias": mean.flip(0), f"{name}.running_mean": mean, f"{name}.running_var": var}

    file = {"conv.weight": torch.randn(32, 1, 3, 3) / 3, **norm("bn", 32), "classifier.weight": torch.zeros(2, 1024)}
    channels = 32
    for number, (out, _) in enumerate(BLOCKS, 1):
        file[f"block{number}.depthwise.weight"] = torch.randn(channels, 1, 3, 3) / 3
        file[f"block{number}.pointwise.weight"] = torch.randn(out, channels, 1, 1) * (2 / channels) ** 0.5
        file |= norm(f"block{number}.depthwise_bn", channels) | norm(f"block{number}.pointwise_bn", out)
        channels = out
    return file


def yamnet(file: dict[str, Tensor], x: Tensor) -> Tensor:
    """YAMNet written out: log(mel + 0.001) B×1×96×64 → B×1024."""

    def layer(x: Tensor, conv: str, norm: str, stride: int, groups: int = 1) -> Tensor:
        weight = file[f"{conv}.weight"]
        sides = [max((math.ceil(n / stride) - 1) * stride + weight.shape[2] - n, 0) for n in x.shape[:1:-1]]
        x = F.conv2d(F.pad(x, [p for n in sides for p in (n // 2, n - n // 2)]), weight, None, stride, 0, 1, groups)
        mean, var, bias = (file[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "bias"))
        return ((x - mean) / (var + 1e-4).sqrt() + bias).clamp(min=0)

    x = layer(x, "conv", "bn", 2)
    for number, (_, stride) in enumerate(BLOCKS, 1):
        x = layer(x, f"block{number}.depthwise", f"block{number}.depthwise_bn", stride, x.shape[1])
        x = layer(x, f"block{number}.pointwise", f"block{number}.pointwise_bn", 1)
    return x.mean((2, 3))


def test_yamnet_is_itself_written_out_on_its_own_log_mel(tmp_path):
    """Prepared log-mels are log(mel + 0.01), YAMNet's log(mel + 0.001): nothing is lost between the two."""
    file = yamnet_file()
    save_file(file, tmp_path / "yamnet.safetensors")
    ours = lite()
    filled = load_published(ours, "yamnet", tmp_path / "yamnet.safetensors")
    assert filled.unused == ("classifier.weight",)
    mel = torch.exp(torch.empty(2, 1, 96, 64).uniform_(-12, 3))
    mel[0, 0, :5] = 0
    embedding = ours.stages[2].embedding(torch.log(mel + 0.01))
    wanted = yamnet(file, torch.log(mel + 0.001))
    assert wanted.std() > 0.01
    torch.testing.assert_close(embedding, wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(yamnet(file, torch.log(mel + 0.01)), wanted, rtol=1e-3, atol=1e-4)


def test_timm_fetches(monkeypatch):
    make = timm.create_model

    def offline(name, pretrained):
        raise OSError("We couldn't connect\nCheck your connection")

    torch.manual_seed(3)
    state = make("tf_efficientnet_lite0", pretrained=False).state_dict()
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: make(name, pretrained=False))
    ours = lite()
    torch.manual_seed(3)
    load_published(ours, "efficientnet-lite0", "timm")
    assert torch.equal(ours.state_dict()["stages.1.to_32.1.0.conv_pw.weight"], state["blocks.6.0.conv_pw.weight"])
    monkeypatch.setattr(timm, "create_model", offline)
    fails(
        lambda: load_published(ours, "efficientnet-lite0", "timm"),
        "tf_efficientnet_lite0: timm could not fetch its weights (We couldn't connect); use a file instead",
    )


def test_weights_of_another_front(tmp_path):
    save_file({k: t.contiguous() for k, t in vgg16().items()}, tmp_path / "vgg.safetensors")
    fails(lambda: load_published(lite(), "vgg16", tmp_path / "vgg.safetensors"), "this network has no VGGFront")
    save_file(yamnet_file(), tmp_path / "yamnet.safetensors")
    fails(lambda: load_published(network(), "yamnet", tmp_path / "yamnet.safetensors"), "this network has no YAMNet")
