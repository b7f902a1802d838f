"""What the tests of training share."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.faulthandler import fault_handler_stderr_fd_key
from tiny_runs import run, tiny, write_store

from crowdexit.training.modules import Experiment


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _faults_are_reported(request):
    """Lightning gives all signals back to whom Python knows of; of faulthandler it does not, and a crash is silent."""
    yield
    if faulthandler.is_enabled():
        faulthandler.disable()
        faulthandler.enable(request.config.stash[fault_handler_stderr_fd_key])


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return write_store(tmp_path_factory.mktemp("store") / "tiny.h5")


@pytest.fixture(scope="session")
def backbone(store, tmp_path_factory) -> Path:
    """A checkpoint of a tiny backbone that has seen two epochs."""
    out = tmp_path_factory.mktemp("backbone")
    run(tiny(store, "density", epochs=2), out)
    return out / "model.safetensors"


@pytest.fixture
def break_off(monkeypatch) -> Callable[[int, int, Any], None]:
    """Makes the next training end in that batch of that epoch, once: by a signal, or by an exception."""

    def make(epoch: int, batch: int, how: Any) -> None:
        def on_train_batch_start(self: Experiment, _: Any, index: int) -> None:
            if (self.current_epoch, index) == (epoch, batch):
                monkeypatch.delattr(Experiment, "on_train_batch_start")
                if isinstance(how, signal.Signals):
                    os.kill(os.getpid(), how)
                else:
                    raise how

        monkeypatch.setattr(Experiment, "on_train_batch_start", on_train_batch_start, raising=False)

    return make
