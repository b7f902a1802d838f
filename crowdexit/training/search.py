"""The search for a SL-ViT branch's d and h: all candidates trained side by side on the frozen backbone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crowdexit.models import zoo
from crowdexit.training.modules import TrainingError
from crowdexit.training.recipe import Recipe, checked

CNN = "cnn"  # what the branch is called whose parameters are the limit


def search_recipe(run: Path, data: Path, place: str, dims: Sequence[int], heads: Sequence[int]) -> Recipe:
    """The recipe that trains the whole grid at one place, and the CNN branch beside it.

    Everything else is as in the run's own recipe; all start from the same seed.

    Args:
        run: a checkpoint that was trained classifier-wise.
        data: the prepared file that it was trained on.

    Raises:
        CrowdExitError: for a checkpoint that is none, was trained otherwise, or an empty grid.
    """
    path = zoo.checkpoint_path(run)
    spec = zoo.read_spec(path)
    recorded = spec.meta.get("recipe")
    if not isinstance(recorded, dict) or recorded.get("stage") != "branches":
        raise TrainingError(f"{path}: not trained classifier-wise; the search takes its recipe from such a run")
    if not dims or not heads or min(*dims, *heads) < 1:
        raise TrainingError("a grid needs positive widths and numbers of heads")
    transformer = "slvit_dim" in zoo.build(spec).config.branch_fields
    dim, head = ("slvit_dim", "slvit_heads") if transformer else ("dim", "heads")
    cnn = "cnn-ignore" if transformer else CNN
    exits: list[dict[str, Any]] = [{"name": CNN, "place": place, "kind": cnn}]
    for d in dict.fromkeys(dims):
        for h in dict.fromkeys(heads):
            exits.append({"name": f"d{d}-h{h}", "place": place, "kind": "slvit", "options": {dim: d, head: h}})
    own = {
        "start": path,
        "branches_from": None,
        "weights": {},
        "senses": None,
        "copycat": None,
        "cache": None,
        "exits": exits,
        "data": {**(recorded.get("data") or {}), "store": data},
    }
    return checked({**recorded, **own}, str(path))
