"""A tiny prepared file, and recipes that train on it in a second or two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file

from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from crowdexit.training.recipe import Recipe
from crowdexit.training.run import train

TINY = {"width": 0.0625, "audio_width": 0.0625, "size": [128, 64], "dim": 4, "heads": 2, "hidden": 8, "filters": 2}
EXITS = [
    {"name": "V1", "place": "V1", "kind": "slvit"},
    {"name": "AV1", "place": "AV1", "kind": "slvit"},
    {"name": "AV2-cnn", "place": "AV2", "kind": "cnn"},
]


def write_store(path: Path, *, only_density: bool = False) -> Path:
    """Ten images to train on and five to validate, of two parts; all but the last have sound."""
    random = np.random.default_rng(0)
    with open_for_writing(path) as file:
        for split, number in (("train", 10), ("val", 5)):
            for i in range(number):
                points = random.uniform((0, 0), (160, 96), (3 + 2 * i, 2)).astype(np.float32)
                image = random.integers(0, 40, (96, 160, 3), np.uint8)
                for x, y in points.astype(int):
                    image[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = 220
                log_mel = random.normal(size=(96, 64)).astype(np.float32)
                without_audio = (split, i) == ("val", 4)
                sample = StoredSample(
                    id=f"{'AB'[i % 2]}_{i}",
                    split=split,
                    image=cv2.imencode(".png", image)[1],
                    points=points[:0] if only_density else points,
                    width=160,
                    height=96,
                    count=len(points),
                    log_mel=None if without_audio else log_mel,
                    audio_source="none" if without_audio else "simulated",
                    takes=None if without_audio else np.stack([log_mel, -log_mel]).astype(np.float16),
                    density=np.full((12, 20), len(points) / 240, np.float32) if only_density else None,
                )
                write_sample(file, sample)
    return path


def tiny(store: Path, stage: str, **keys: Any) -> Recipe:
    """A recipe of that stage; what stands in ``data`` and ``optimiser`` is added to its defaults here."""
    data = {"store": store, "workers": 0, "hear": 0.5, **keys.pop("data", {})}
    optimiser = {"lr": 2e-3, "schedule": "cosine", "clip": 5.0, **keys.pop("optimiser", {})}
    content = {
        "stage": stage,
        "model": "audiocsrnet-s",
        "changes": TINY,
        "epochs": 3,
        "batch": 4,
        "precision": "32-true",
        "data": data,
        "optimiser": optimiser,
        **({"exits": EXITS, "loss": "mae"} if stage == "branches" else {}),
        **keys,
    }
    return Recipe.model_validate(content)


def run(recipe: Recipe, out: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Train on the CPU without a word and return the last weights of everything that learns (``last.ckpt``)."""
    with Path(os.devnull).open("w") as nowhere:
        train(recipe, out, accelerator="cpu", console=Console(file=nowhere), **options)
    return last(out)


def last(out: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(out / "last.ckpt", weights_only=True)["state_dict"]
    return weights


def best(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are identical to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
