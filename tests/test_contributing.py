"""What CONTRIBUTING.md shows of each registry works as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import data_prep
from crowdexit.data.store import Store
from crowdexit.utils import command
from data_prep.command import app

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
SHOWN = dict(re.findall(r"^\*\*An? ([\w ]+)\*\*.*?^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
USE = """
import torch
from crowdexit.models import zoo
from crowdexit.models.stages import inputs
from crowdexit.runtimes.selection import automatic_names, select_runtime

TINY = {"width": 0.0625, "size": [64, 64], "dim": 4, "heads": 2, "hidden": 8}
spec = zoo.Spec(
    "audiocsrnet-s",
    (zoo.ExitSpec("mean", "AV2", "mean", {"width": 4}), zoo.ExitSpec("cnn", "AV1", "cnn")),
    {**TINY, "front": "patches", "audio_encoder": "bands"},
)
assert "plain" in automatic_names()
for network, exits in ((zoo.build(spec), ["cnn", "mean", "final"]), (zoo.build(zoo.Spec("patchnet")), ["final"])):
    chain = select_runtime("plain").ready(network)
    silence = torch.zeros(2, dtype=torch.bool)
    features = inputs(torch.zeros(2, 3, 64, 64), torch.full((2, 1, 96, 64), torch.nan), silence)
    answers = dict(chain.stream(features))
    assert list(answers) == exits
    assert all(torch.isfinite(answer.value).all() for answer in answers.values())
assert network.branch_kinds("1") == ("cnn", "slvit", "mean")
"""


def test_there_is_one_of_each_in_few_lines():
    assert [*SHOWN] == ["front", "audio encoder", "backbone", "kind of exits", "runtime", "data set"]
    for what, code in SHOWN.items():
        assert sum(bool(line.strip()) for line in code.splitlines()) < 20, what


def test_networks_exits_and_runtimes():
    program = "\n".join([*(code for what, code in SHOWN.items() if what != "data set"), USE])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_data_set(tmp_path, monkeypatch, capsys, crowd_image):
    (tmp_path / "village.py").write_text(SHOWN["data set"])
    monkeypatch.setattr(data_prep, "__path__", [*data_prep.__path__, str(tmp_path)])
    (tmp_path / "photos").mkdir()
    image, heads = crowd_image(heads=3)
    (tmp_path / "photos" / "square.jpg").write_bytes(image)
    (tmp_path / "photos" / "square.txt").write_text("\n".join(f"{x} {y}" for x, y in heads))
    try:
        assert command.run(app, ["--help"]) == 0
        assert "Our village" in capsys.readouterr().out
        assert command.run(app, ["village", str(tmp_path / "photos"), str(tmp_path / "set.h5")]) == 0
    finally:
        sys.modules.pop("data_prep.village", None)
    assert Store(tmp_path / "set.h5").counts("train") == pytest.approx({"square": 3})
