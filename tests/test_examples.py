"""The examples in docstrings do what they show."""

from __future__ import annotations

import doctest
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from crowdexit.data.store import StoredSample, open_for_writing, write_sample
from crowdexit.export.writer import export

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("crowdexit", "app", "data_prep")
    for path in (ROOT / folder).rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)


@pytest.fixture
def samples(request, tmp_path, monkeypatch) -> None:
    """The working directory has the files that the examples name."""
    for name in ("street.jpg", "street-simulated.wav", "crowd.jpg"):
        shutil.copy(ROOT / "crowdexit" / "samples" / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    module = request.node.callspec.params["module"]
    if module == "crowdexit.data.store":
        write_store(tmp_path / "crowd.h5", (tmp_path / "street.jpg").read_bytes())
    elif module == "crowdexit.export.runner":
        export("audiocsrnet-lite", tmp_path / "street-v0", exits=["V0"])


def write_store(path: Path, image: bytes) -> None:
    """A sample to train on with one head, and one for validation with two."""
    with open_for_writing(path) as file:
        for number, split in ((1, "train"), (2, "val")):
            heads = np.full((number, 2), 20, np.float32)
            data = np.frombuffer(image, np.uint8)
            write_sample(file, StoredSample(f"B_IMG_{number}", split, data, heads, width=768, height=576, count=number))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.usefixtures("samples")
def test_examples(module):
    done = doctest.testmod(import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert done.attempted > 0
    assert done.failed == 0
