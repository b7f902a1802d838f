"""A run that breaks off loses at most the running epoch, and goes on as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from tiny_runs import TINY, best, last, run, same, tiny

from crowdexit.training.modules import Experiment, TrainingError

PLATEAU = {"schedule": "plateau", "patience": 0, "factor": 0.3, "lr": 2e-2}


class Lost(BaseException):
    """Stands for a process that is no more."""


@pytest.mark.parametrize("optimiser", [{}, PLATEAU], ids=["cosine", "plateau"])
@pytest.mark.parametrize("stage", ["density", "branches"])
def test_resumed_run_ends_like_an_uninterrupted_one(store, backbone, tmp_path, break_off, stage, optimiser):
    start = backbone if stage == "branches" else None
    # One a head, so that the tiny network over- and undercounts in turn and the plateau has something to do.
    changes = {**TINY, "density_scale": 1.0} if start is None else {}
    keys = {"ema": 0.8, "changes": changes, "optimiser": {**optimiser, "warmup": 3}}
    recipe = tiny(store, stage, start=start, epochs=4, **keys)
    expected = run(recipe, tmp_path / "whole")
    break_off(2, 1, Lost())
    with pytest.raises(Lost):
        run(recipe, tmp_path / "broken")
    assert not same(last(tmp_path / "broken"), expected)
    assert same(run(recipe, tmp_path / "broken", resume=True), expected)
    assert same(best(tmp_path / "broken"), best(tmp_path / "whole"))
    states = [torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("broken", "whole")]
    for key in ("crowdexit_branches", "crowdexit_best", "lr_schedulers"):
        if key in states[0]:
            assert str(states[0][key]) == str(states[1][key])
    if optimiser:
        rates = [scheduler["_last_lr"][0] for scheduler in states[1]["lr_schedulers"]]
        assert min(rates) < recipe.optimiser.lr, "the plateau was never reached, which tests nothing"


def test_two_trainings_do_not_write_into_one_folder(store, tmp_path):
    """As when a suite was killed and begun again while what it trained lived on."""
    recipe = tiny(store, "density", epochs=1)
    expected = run(recipe, tmp_path / "run")
    with (
        FileLock(tmp_path / "run" / "training.lock"),
        pytest.raises(TrainingError, match=r"run: another training is writing to it$"),
    ):
        run(recipe.model_copy(update={"epochs": 2}), tmp_path / "run", resume=True)
    assert same(last(tmp_path / "run"), expected)
    assert not same(run(recipe.model_copy(update={"epochs": 2}), tmp_path / "run", resume=True), expected)


def test_same_seed_same_result(store, tmp_path):
    recipe = tiny(store, "density", epochs=2)
    expected = run(recipe, tmp_path / "one")
    assert same(run(recipe, tmp_path / "again"), expected)
    assert not same(run(recipe.model_copy(update={"seed": 1}), tmp_path / "other"), expected)


@pytest.mark.slow
def test_workers_change_nothing(store, tmp_path):
    expected = run(tiny(store, "density", epochs=2), tmp_path / "none")
    assert same(run(tiny(store, "density", epochs=2, data={"workers": 2}), tmp_path / "two"), expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_and_leave_the_epoch_before(store, tmp_path, break_off, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    recipe = tiny(store, "density")
    break_off(1, 1, number)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as left:
        run(recipe, tmp_path)
    if number == signal.SIGINT:
        assert left.type is KeyboardInterrupt
    else:
        assert left.value.code == 143
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0
    assert (tmp_path / "model.safetensors").is_file()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert run(recipe, tmp_path, resume=True)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2


def test_a_finished_run_resumed_does_nothing(store, backbone, tmp_path, monkeypatch):
    out = tmp_path / "early"
    recipe = tiny(store, "branches", start=backbone, epochs=9, stop=1, optimiser={"lr": 1e-12})
    run(recipe, out)
    state = torch.load(out / "last.ckpt", weights_only=True)
    assert state["epoch"] < 8, "with no rate to speak of nothing gets better"
    monkeypatch.setattr(Experiment, "on_train_batch_start", lambda *_: pytest.fail("it trained"), raising=False)
    run(recipe, out, resume=True)


def test_a_run_is_not_overwritten(store, tmp_path):
    recipe = tiny(store, "density", epochs=1)
    run(recipe, tmp_path)
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(TrainingError, match="already holds a run; continue it with --resume"):
        run(recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["density", "branches"])
def test_killed_process(store, backbone, tmp_path, stage):
    recipe = tiny(store, stage, start=backbone if stage == "branches" else None, epochs=4)
    expected = run(recipe, tmp_path / "whole")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    script = Path(__file__).with_name("launch.py")
    command = [sys.executable, script, tmp_path / "recipe.yaml", tmp_path / "killed"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([*command, "--kill", "2"], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    subprocess.run([*command, "--resume"], env=environment, check=True)
    assert same(last(tmp_path / "killed"), expected)
