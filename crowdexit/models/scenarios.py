"""The SL-ViT paper's scenarios: which backbone, which data, which branches, and the hyper-parameters of table III."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crowdexit.errors import CrowdExitError

CLASSES: Mapping[str, int] = {"cifar10": 10, "cifar100": 100, "speech-commands": 12, "gtzan": 10}
AUDIO_KINDS = ("speech-commands", "gtzan")


def classes_of(dataset: str) -> int:
    """The number of classes of a data set of the paper.

    Raises:
        CrowdExitError: for another data set.
    """
    if dataset not in CLASSES:
        raise CrowdExitError(f"no data set {dataset!r} (there are {', '.join(CLASSES)})")
    return CLASSES[dataset]


def branch_options(model: str, dataset: str, place: str, kind: str) -> dict[str, Any]:
    """Branch options of a scenario that differ from the model's defaults (d = 32, h = 12, p by the rule; table III).

    On GTZAN the second branch of ResNet152 has no second residual connection (SL-ViT paper, IV: without it the
    accuracy is significantly higher there).

    Raises:
        CrowdExitError: for a data set that is not one of the paper's.
    """
    classes_of(dataset)
    if kind != "slvit":
        return {}
    if model == "resnet152" and dataset in AUDIO_KINDS and place == "2":
        return {"heads": 24, "second_residual": False} if dataset == "gtzan" else {"heads": 24}
    if model == "inceptionv3" and dataset == "cifar100":
        return {"dim": 36, "heads": 8}
    return {}
