"""How much faster branches train together than one by one: ``python -m benchmarks.bench_branches``.

The seven branches of the multi-exit ViT paper at all eleven layers of ``transcrowd-token-s``: 77 on one pass of the
frozen backbone, against 77 runs of one each. Weights, images and sounds are random; nothing is learned here, but
both ways have to end at the same validation errors.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
from rich.console import Console

from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from crowdexit.models import zoo
from crowdexit.training.branches import BranchTraining
from crowdexit.training.recipe import Recipe
from crowdexit.training.run import train

MODEL = "transcrowd-token-s"
KINDS = ("mlp", "cnn-ignore", "cnn-add", "cnn-project", "vit", "mixer", "resmlp")
PLACES = tuple(str(layer) for layer in range(1, 12))


def write_store(path: Path, images: int) -> None:
    """Random images of one view, each with some heads, to train on and to validate with."""
    random = np.random.default_rng(0)
    with open_for_writing(path) as file:
        for number in range(2 * images):
            points = random.uniform(0, 384, (20 + number, 2)).astype(np.float32)
            image = cv2.imencode(".png", random.integers(0, 255, (384, 384, 3), np.uint8))[1]
            split = "train" if number < images else "val"
            write_sample(file, StoredSample(str(number), split, image, points, 384, 384, len(points)))


def epoch(exits: list[dict[str, Any]], start: Path, data: Path, out: Path, batch: int) -> float:
    """Train these branches for one epoch; seconds that the training steps took."""
    seconds = 0.0
    step = BranchTraining.training_step

    def timed(self: BranchTraining, *arguments: Any) -> None:
        nonlocal seconds
        begun = perf_counter()
        step(self, *arguments)
        seconds += perf_counter() - begun

    recipe = Recipe.model_validate(
        {
            "stage": "branches",
            "model": MODEL,
            "start": start,
            "exits": exits,
            "data": {"store": data, "workers": 0},
            "optimiser": {"name": "adam", "lr": 1e-4},
            "loss": "mae",
            "epochs": 1,
            "batch": batch,
        }
    )
    with patch.object(BranchTraining, "training_step", timed):
        train(recipe, out, accelerator="cpu", console=Console(file=io.StringIO()))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=int, default=16, help="of an epoch")
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    exits = [{"name": f"{place}-{kind}", "place": place, "kind": kind} for place in PLACES for kind in KINDS]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data, start = root / "data.h5", root / "start.safetensors"
        write_store(data, args.images)
        torch.manual_seed(0)
        zoo.save(zoo.build(zoo.Spec(MODEL)), zoo.Spec(MODEL), start)
        epoch(exits[:1], start, data, root / "warm", args.batch)
        together = epoch(exits, start, data, root / "together", args.batch)
        said = zoo.read_spec(root / "together" / "model.safetensors").meta["validation"]
        alone, apart = 0.0, 0.0
        for e in exits:
            alone += epoch([e], start, data, root / e["name"], args.batch)
            own = zoo.read_spec(root / e["name"] / "model.safetensors").meta["validation"][e["name"]]
            apart = max(apart, abs(own["error"] - said[e["name"]]["error"]) / own["error"])
            print(f"\r{e['name']:16} {alone:7.1f} s one by one", end="", flush=True)
    print(f"\n{len(exits)} branches of {MODEL}, {args.images} images an epoch, batch {args.batch}")
    print(f"together   {together:7.1f} s")
    print(f"one by one {alone:7.1f} s   {alone / together:.1f}× as long")
    print(f"validation errors differ by {apart:.1e} of themselves at most")


if __name__ == "__main__":
    main()
