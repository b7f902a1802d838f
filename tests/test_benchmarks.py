"""The benchmarks run end to end at tiny sizes; of their figures only that they are there is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.__main__ import BENCHES
from benchmarks.bench_coverage import coverage
from benchmarks.bench_scaling import growth
from benchmarks.bench_static import worth_asking
from crowdexit.analysis.tradeoff import Point

ROOT = Path(__file__).parents[1]


def test_one_command_for_all_of_them(tmp_path):
    """Two of them: the others take longer, and are run alike."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "runtimes,scaling", "--out", str(tmp_path)]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stderr
    data = json.loads((tmp_path / "benchmarks.json").read_text())
    assert data["quick"]
    assert set(data["figures"]) == {"runtimes", "scaling"}
    assert len(data["targets"]) >= 8
    assert "these figures mean nothing" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000
    again = subprocess.run([*command[:4], "--only", "sleep"], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "no benchmark 'sleep'" in again.stderr


def test_what_is_missed_is_told():
    state = {"requests": 9, "unanswered_though_it_fits": 0.0, "late_p99_ms": 4.0}
    figures = {"model": "m", "runtime": "r", "idle": state, "one core busy": {**state, "late_p99_ms": 5.1}}
    assert [target.reached for target in BENCHES["deadlines"].targets(figures)] == [True, True, True, False]
    video = {"share_of_slower": 0.8, "fps": {"pipeline": 30.0}, "video": "", "what": ""}
    assert [target.reached for target in BENCHES["video"].targets(video)] == [False, True]


def test_growth_is_the_power():
    assert growth({1: 3.0, 2: 6.0, 8: 24.0}) == pytest.approx(1)
    assert growth({1: 1.0, 4: 16.0}) == pytest.approx(2)


def test_intervals_that_hold_what_they_promise():
    random = np.random.default_rng(0)
    counts = random.uniform(0, 500, 400)
    told = coverage(counts, counts + (counts + 10) * random.normal(0, 0.2, 400), 0.9)
    assert told["covered"] == pytest.approx(90, abs=2)
    assert told["width"] == pytest.approx(0.2 * 1.645, abs=0.05)


def test_exits_worth_asking():
    made = [Point(str(n), str(n), "mlp", n, error, True) for n, error in enumerate((50.0, 49.5, 48.9, 48.0, 47.8))]
    assert worth_asking(made, 1.0) == ["0", "2", "4"]
    assert worth_asking([Point("a", "1", "mlp", 1, 9.0, False), *made], 0.0) == ["0", "1", "2", "3", "4"]
