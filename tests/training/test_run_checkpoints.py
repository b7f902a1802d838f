"""The checkpoints a run goes on from: whole on the disk, two of them, and damage is reported instead of trained on."""

from __future__ import annotations

import errno
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from tiny_runs import run, tiny

from crowdexit.cli.main import app
from crowdexit.training.modules import TrainingError
from crowdexit.training.run import BEFORE, LAST, RunCheckpoints, checkpoint_to_resume
from crowdexit.utils import command


@pytest.fixture
def out(tmp_path) -> Path:
    """A run's folder after three epochs, of which two are kept."""
    for epoch in range(3):
        RunCheckpoints().save_checkpoint({"epoch": epoch, "w": torch.full((50,), epoch)}, tmp_path / LAST)
    return tmp_path


def resumed(out: Path) -> tuple[Path | None, str]:
    said = io.StringIO()
    return checkpoint_to_resume(out, Console(file=said, width=500)), said.getvalue()


def test_last_two_checkpoints_stay(out):
    assert sorted(path.name for path in out.iterdir()) == [BEFORE, LAST]
    assert [RunCheckpoints().load_checkpoint(out / name)["epoch"] for name in (LAST, BEFORE)] == [2, 1]
    assert resumed(out) == (out / LAST, "")


def damaged(data: bytes) -> list[bytes]:
    """Empty, cut short anywhere, zeroed, and with one byte changed anywhere."""
    random = np.random.default_rng(0)
    cuts = [data[:size] for size in (0, 1, 100, len(data) // 2, len(data) - 24, len(data) - 1)]
    flips = [bytearray(data) for _ in range(60)]
    for flipped in flips:
        flipped[random.integers(len(data))] ^= 1 << random.integers(8)
    return [*cuts, bytes(len(data)), data + b"x", *map(bytes, flips)]


def test_damaged_checkpoint_falls_back_to_the_previous(out):
    whole = (out / LAST).read_bytes()
    for data in damaged(whole):
        (out / LAST).write_bytes(data)
        with pytest.raises(TrainingError, match=r"last\.ckpt: damaged \("):
            RunCheckpoints().load_checkpoint(out / LAST)
        path, said = resumed(out)
        assert path == out / BEFORE
        assert said.startswith(f"{out / LAST}: damaged (")
        assert said.endswith("; going on from before-last.ckpt, an epoch before\n")
        assert not (out / LAST).exists(), "or it would take the place of the whole one"


def test_without_a_whole_one_it_says_what_to_do(out):
    for name in (LAST, BEFORE):
        (out / name).write_bytes(b"")
    with pytest.raises(TrainingError, match=r"damaged \(it has 0 bytes\), and there is no other .* train again$"):
        resumed(out)
    for name in (LAST, BEFORE):
        (out / name).unlink()
    assert resumed(out) == (None, "")


def test_a_kill_between_the_two_names_loses_nothing(out):
    (out / LAST).replace(out / BEFORE)
    assert resumed(out) == (out / BEFORE, "")


def test_a_full_disk_keeps_the_last_one(out, monkeypatch):
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("crowdexit.training.run.sync", full)
    with pytest.raises(TrainingError) as error:
        RunCheckpoints().save_checkpoint({"epoch": 3}, out / LAST)
    assert f"{out / LAST}: the disk is full (" in str(error.value)
    assert " needed, " in str(error.value)
    assert str(error.value).endswith("the previous epoch's checkpoint is kept; free some space and resume the run")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_damage_ends_the_command_with_one_line_and_code_2(store, tmp_path, capsys):
    out = tmp_path / "run"
    recipe = tiny(store, "density", epochs=2)
    run(recipe, out)
    data = bytearray((out / LAST).read_bytes())
    data[len(data) // 2] ^= 4
    (out / LAST).write_bytes(data)
    run(recipe, out, resume=True)
    states = [torch.load(out / name, weights_only=True) for name in (LAST, BEFORE)]
    assert [state["epoch"] for state in states] == [1, 0]
    for name in (LAST, BEFORE):
        (out / name).write_bytes(bytes(data[:1000]))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    arguments = ["train", str(tmp_path / "recipe.yaml"), "--out", str(out), "--resume", "--accelerator", "cpu"]
    assert command.run(app, arguments) == 2
    assert f"error: {out / LAST}: damaged (its checksum does not match)" in capsys.readouterr().err


def test_a_damaged_best_network_is_not_gone_on_with(store, tmp_path):
    recipe = tiny(store, "density", epochs=1)
    run(recipe, tmp_path)
    data = bytearray((tmp_path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(TrainingError, match=r"the weights are damaged .* the best network so far"):
        run(recipe, tmp_path, resume=True)
