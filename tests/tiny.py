"""A network small enough for tests, with a density that is not lost in rounding."""

from __future__ import annotations

import torch
from branches import both_kinds

from crowdexit.inference.counter import CrowdCounter
from crowdexit.models import zoo
from crowdexit.runtimes.eager import Eager

TINY = {
    "width": 0.0625,
    "audio_width": 0.0625,
    "size": [128, 64],
    "dim": 4,
    "heads": 2,
    "hidden": 8,
    "filters": 2,
    "density_scale": 0.1,
}


def tiny_counter() -> CrowdCounter:
    """Random weights on a canvas of 128×64, all exits of both kinds there, eager float32."""
    torch.manual_seed(3)
    network = zoo.build(zoo.Spec("audiocsrnet-s", exits=both_kinds(), changes=TINY))
    return CrowdCounter(network, "tiny", runtime=Eager())
