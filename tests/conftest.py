"""Makers of small inputs that several tests need."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tiny import tiny_counter

from crowdexit.inference.counter import CrowdCounter

# A shell that starts the tests in the background has them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def eager_alone(monkeypatch, tmp_path_factory):
    """``--runtime auto`` tries nothing, for each test has another network; nothing goes to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("crowdexit.runtimes.selection.candidates", lambda _: ())


@pytest.fixture(autouse=True)
def the_log_as_it_was():
    """What silences the log for the tests after it is named here, not there."""
    root = logging.getLogger()
    before = root.level, [*root.filters], logging.root.manager.disable
    yield
    assert (root.level, root.filters, logging.root.manager.disable) == before


@pytest.fixture
def homeless(monkeypatch):
    """A user without a home folder."""

    def home(cls: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(home))


CrowdImage = Callable[..., tuple[bytes, NDArray[np.float64]]]


@pytest.fixture
def crowd_image() -> CrowdImage:
    """Makes a JPEG of light heads on a dark ground, and where they are: (bytes, (heads, 2) x y)."""

    def make(width: int = 96, height: int = 64, heads: int = 5, seed: int = 0) -> tuple[bytes, NDArray[np.float64]]:
        random = np.random.default_rng(seed)
        points = random.uniform((0, 0), (width, height), (heads, 2))
        pixels = random.integers(0, 40, (height, width, 3), np.uint8)
        for x, y in points.astype(int):
            pixels[max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3] = 220
        buffer = BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG")
        return buffer.getvalue(), points

    return make


@pytest.fixture(scope="session")
def counter() -> CrowdCounter:
    return tiny_counter()


@pytest.fixture
def image_file(tmp_path, crowd_image):
    """Writes a JPEG of that name into the test's folder."""

    def write(name: str = "crowd.jpg", **options) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(crowd_image(**options)[0])
        return path

    return write
