"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import shutil
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("crowdexit", "app", "data_prep")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)


@pytest.fixture
def samples(tmp_path, monkeypatch) -> Path:
    """The working directory has the samples that the examples name."""
    for name in ("street.jpg", "street-simulated.wav", "crowd.jpg"):
        shutil.copy(ROOT / "crowdexit" / "samples" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", MODULES)
def test_examples(module, samples):
    done = doctest.testmod(import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert done.attempted > 0
    assert done.failed == 0
