"""Training on several processes: the same samples, the same weights everywhere, the same figures."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import EXITS, last, run, same, tiny

from crowdexit.data.dataset import CrowdDataset, Setting
from crowdexit.data.store import Store
from crowdexit.models import zoo
from crowdexit.models.backbones.audiocsrnet import AudioCSRNetConfig
from crowdexit.training.data import CrowdData
from crowdexit.training.modules import TrainingError, record

LAUNCH = Path(__file__).with_name("launch.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def launch(recipe, out: Path, *options: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    out.mkdir(exist_ok=True)
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    command = [sys.executable, *before, str(LAUNCH), str(out / "recipe.yaml"), str(out), *options]
    return subprocess.run(command, env=ENVIRONMENT, check=False, timeout=300, capture_output=True, text=True)


def launch_both(recipe, out: Path) -> str:
    """As torchrun does it, but at once and without its own process; what the two said."""
    out.mkdir()
    (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(LAUNCH), str(out / "recipe.yaml"), str(out)],
            env={**ENVIRONMENT, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        said = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    return "".join(said)


def check(recipe, out: Path) -> None:
    """The processes together saw the plan, and ended with the same finite weights."""
    ranks = [torch.load(out / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*ranks)
    assert all(torch.isfinite(tensor).all() for tensor in ranks[0].values())
    draws = [Counter((out / f"seen{rank}.txt").read_text().split("\n")) for rank in (0, 1)]
    data = CrowdData(recipe, AudioCSRNetConfig(size=(128, 64)))
    plan = data.plan()
    expected: Counter[str] = Counter()
    for epoch in range(recipe.epochs):
        plan.set_epoch(epoch)
        expected.update(f"{data.train_set.ids[index]} {draw}" for index, draw in plan.plan())
    assert draws[0] + draws[1] == expected
    assert draws[0].total() == draws[1].total()


def test_density_on_two_processes(store, tmp_path):
    recipe = tiny(store, "density", epochs=2, ema=0.5)
    said = launch_both(recipe, tmp_path / "two")
    check(recipe, tmp_path / "two")
    assert said.count("epoch 2/2") == 1, "only the first process speaks"
    # The figures of the best epoch, from one process and one image at a time.
    network, spec = zoo.load(tmp_path / "two")
    errors: dict[str, list[float]] = {"A": [], "B": []}
    with Store(store) as opened:
        images = CrowdDataset(opened, "val", opened.ids("val"), Setting(network.config.size))
        for image in (images[i] for i in range(len(images))):
            if image["has_audio"]:
                batch = {k: v[None] for k, v in image.items() if isinstance(v, torch.Tensor)}
                with torch.no_grad():
                    count = network(record(batch))["final"].value
                errors[image["id"][0]].append(abs(count.item() - image["count"].item()))
    for part, values in errors.items():
        found = spec.meta["validation"]["sound"][f"mae/{part}"]
        assert found == pytest.approx(sum(values) / len(values), rel=1e-5)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(store, tmp_path):
    """Without batch normalisation's statistics in between, a step on two halves of a batch is the same step."""
    keys = {"start": None, "epochs": 2, "data": {"draws": 8}, "optimiser": {"schedule": "constant"}}
    run(tiny(store, "density", epochs=1), tmp_path / "backbone")
    keys |= {"start": tmp_path / "backbone" / "model.safetensors", "changes": {"dropout": 0.0}}
    recipe = tiny(store, "branches", **keys)
    one = run(recipe, tmp_path / "one")
    done = launch(recipe, tmp_path / "two", "--devices", "2")
    assert done.returncode == 0, done.stderr
    two = last(tmp_path / "two")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_branches_on_two_processes_under_torchrun(store, backbone, tmp_path):
    exits = [*EXITS, {"name": "AV1-cnn", "place": "AV1", "kind": "cnn"}]  # with batch normalisation of its own
    recipe = tiny(store, "branches", start=backbone, exits=exits, epochs=6, stop=1, ema=0.5, optimiser={"lr": 0.02})
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = launch(recipe, tmp_path / "two", before=torchrun)
    assert done.returncode == 0, done.stderr
    ranks = [torch.load(tmp_path / "two" / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert same(*ranks)
    _, spec = zoo.load(tmp_path / "two")
    assert spec.meta["validation"].keys() == {e["name"] for e in exits}


@pytest.mark.slow
def test_killed_and_resumed_on_two_processes(store, tmp_path):
    recipe = tiny(store, "density", epochs=3)
    assert launch(recipe, tmp_path / "whole", "--devices", "2").returncode == 0
    check(recipe, tmp_path / "whole")
    killed = launch(recipe, tmp_path / "killed", "--devices", "2", "--kill", "1")
    assert killed.returncode == -signal.SIGKILL
    assert launch(recipe, tmp_path / "killed", "--devices", "2", "--resume").returncode == 0
    assert same(last(tmp_path / "killed"), last(tmp_path / "whole"))


def test_what_processes_cannot_share(store, tmp_path):
    with pytest.raises(TrainingError, match="a batch of 4 cannot be shared evenly by 3 processes"):
        run(tiny(store, "density"), tmp_path, devices=3)
    with pytest.raises(TrainingError, match=r"fewer validation samples \(2\) than processes"):
        run(tiny(store, "density", data={"val_ids": "B_*"}), tmp_path, devices=4)
