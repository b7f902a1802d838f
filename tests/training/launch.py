"""Run by tests in processes of their own: launch.py RECIPE OUT [--resume] [--devices N] [--kill EPOCH]."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch

from crowdexit.data.dataset import CrowdDataset
from crowdexit.training.modules import Experiment
from crowdexit.training.recipe import read_recipe
from crowdexit.training.run import train


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe")
    parser.add_argument("out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--kill", type=int, default=-1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    seen: list[str] = []
    own = CrowdDataset.__getitem__

    def noted(self: CrowdDataset, key: Any) -> Any:
        item = own(self, key)
        if isinstance(key, tuple):
            seen.append(f"{item['id']} {key[1]}")
        return item

    def kill(self: Experiment, _: Any, index: int) -> None:
        if (self.current_epoch, index) == (options.kill, 1):
            os.kill(os.getpid(), signal.SIGKILL)

    def keep(self: Experiment) -> None:
        torch.save(self.state_dict(), options.out / f"rank{rank}.pt")

    CrowdDataset.__getitem__ = noted  # type: ignore[method-assign]
    Experiment.on_train_batch_start = kill  # type: ignore[method-assign, assignment]
    Experiment.on_train_end = keep  # type: ignore[method-assign]
    train(read_recipe(options.recipe), options.out, resume=options.resume, devices=options.devices, accelerator="cpu")
    (options.out / f"seen{rank}.txt").write_text("\n".join(seen))


if __name__ == "__main__":
    main()
