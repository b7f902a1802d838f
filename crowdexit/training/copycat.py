"""Copycat: branches that were trained go on learning from images that nobody has labelled (SL-ViT paper, III-C)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crowdexit.models import zoo
from crowdexit.training.modules import TrainingError
from crowdexit.training.recipe import Recipe, checked


def copycat_recipe(
    run: Path,
    data: Path,
    images: Path,
    *,
    split: str = "train",
    ratio: float = 2.0,
    teacher: Path | None = None,
    epochs: int | None = None,
    lr: float | None = None,
) -> Recipe:
    """The recipe that fine-tunes a run's branches on its own data and on unlabelled images.

    Everything that is not said here is as in the run's own recipe.

    Args:
        run: a checkpoint that was trained classifier-wise.
        data: the prepared file that it was trained on.
        images: a folder of images, or a prepared file. split: of it.
        ratio: how many unlabelled samples there are for each labelled one.
        teacher: shipped name or checkpoint whose final exit labels them; default: the run's own backbone.
        epochs: default: the run's own.
        lr: default: a tenth of the run's own, the lowest where it tried several.

    Raises:
        CrowdExitError: for a checkpoint that is none, or was trained otherwise, or values that mean nothing.
    """
    path = zoo.checkpoint_path(run)
    recorded = zoo.read_spec(path).meta.get("recipe")
    if not isinstance(recorded, dict) or recorded.get("stage") != "branches":
        raise TrainingError(f"{path}: not trained classifier-wise; copycat continues branches on a frozen backbone")
    optimiser = dict(recorded.get("optimiser") or {})
    run_lr = min(optimiser.get("rates") or [optimiser.get("lr", 1e-3)])
    optimiser |= {"rates": (), "lr": run_lr / 10 if lr is None else lr}
    own: dict[str, Any] = {
        "start": path,
        "branches_from": path,
        "weights": {},
        "senses": None,
        "fit": 0,
        "cache": None,
        "optimiser": optimiser,
        "data": {**(recorded.get("data") or {}), "store": data},
        "copycat": {"pictures": images, "split": split, "ratio": ratio, "teacher": teacher},
    }
    if epochs is not None:
        own["epochs"] = epochs
    return checked({**recorded, **own}, str(path))
