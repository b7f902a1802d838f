"""A counter small enough for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from branches import both_kinds
from tiny import TINY

from crowdexit import zoo
from crowdexit.inference.counter import CrowdCounter
from crowdexit.inference.runtimes.eager import Eager


@pytest.fixture(scope="session")
def counter() -> CrowdCounter:
    """Random weights on a canvas of 128×64, all exits of both kinds there, eager float32."""
    torch.manual_seed(3)
    network = zoo.build(zoo.Spec("audiocsrnet-s", exits=both_kinds(), changes=TINY))
    return CrowdCounter(network, "tiny", runtime=Eager())


@pytest.fixture
def picture_file(tmp_path, crowd_picture):
    """Writes a JPEG of that name into the test's folder."""

    def write(name: str = "crowd.jpg", **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crowd_picture(**options)[0])
        return path

    return write
