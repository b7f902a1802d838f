"""A counter small enough for tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_counter

from crowdexit.inference.counter import CrowdCounter


@pytest.fixture(scope="session")
def counter() -> CrowdCounter:
    return tiny_counter()


@pytest.fixture
def picture_file(tmp_path, crowd_picture):
    """Writes a JPEG of that name into the test's folder."""

    def write(name: str = "crowd.jpg", **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crowd_picture(**options)[0])
        return path

    return write
