"""The benchmarks run end to end at tiny sizes; of their figures only that they are there is looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bench_empty, bench_gpu
from benchmarks.__main__ import BENCHES, Bench, main
from benchmarks.bench_coverage import covered
from benchmarks.bench_deadlines import STATES
from benchmarks.bench_scaling import growth, steepest
from benchmarks.bench_static import worth_asking
from benchmarks.machine import Times, in_turn
from crowdexit.evaluation.tradeoff import Point

ROOT = Path(__file__).parents[1]


def test_one_command_for_all_of_them(tmp_path):
    """One of them: the others take longer, and are started alike."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "scaling", "--out", str(tmp_path)]
    report = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert report.returncode == 0, report.stderr
    data = json.loads((tmp_path / "benchmarks.json").read_text())
    assert data["quick"]
    assert set(data["figures"]) == {"scaling"}
    assert len(data["targets"]) == 3
    assert "these figures mean nothing" in (tmp_path / "benchmarks.md").read_text()
    assert (tmp_path / "benchmarks.png").stat().st_size > 10_000


@pytest.mark.slow
def test_runtimes_are_measured(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "runtimes", "--out", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=1200).returncode == 0
    assert len(json.loads((tmp_path / "benchmarks.json").read_text())["targets"]) >= 8


def test_a_benchmark_that_there_is_not(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "sleep"])
    with pytest.raises(SystemExit) as refused:
        main()
    assert refused.value.code == 2
    assert "no benchmark 'sleep'" in capsys.readouterr().err


def test_missed_targets_are_reported():
    state = {"requests": 9, "first_exit_fits": 5, "unanswered_though_it_fits": 0.0, "late_p99_ms": 4.0}
    late, none_fits = {**state, "late_p99_ms": 5.1}, {**state, "first_exit_fits": 0}
    states = dict(zip(STATES, (state, late, none_fits, state), strict=True))
    report = BENCHES["deadlines"].targets({"model": "m", "runtime": "r", **states})
    assert [target.reached for target in report] == [True, True, True, False, False, True, True, True]
    video = {"share_of_slower": 0.8, "fps": {"pipeline": 30.0}, "video": "", "what": ""}
    assert [target.reached for target in BENCHES["video"].targets(video)] == [False, True]


def of_runtime(gain: float, off: float = 0.0) -> dict[str, object]:
    speedups = {"V1": {"measured": 1.4, "of_flops": 1.5}}
    share = {"share_of_matrix_rate": 0.8, "exits_cost": 1.04, "speedups": speedups}
    return {"faster_than_plain": gain, "off_plain": off, **share}


def test_runtimes_are_judged_by_what_the_processor_can():
    ran = {"eager": of_runtime(1.2), "openvino-bf16": of_runtime(9.0), "openvino-int8": of_runtime(20.0, off=1.2)}
    figures = {"model": "m", "size": "s", "machine": {"instructions": []}, "runtimes": ran}
    gain, share, cost, leaving = BENCHES["runtimes"].targets(figures)
    assert (gain.found, gain.reached) == ("9.00× (openvino-bf16)", True)  # what is far from the plain answer is none
    assert (share.reached, cost.reached, leaving.reached) == (None, True, False)
    figures["machine"] = {"instructions": ["amx_bf16"]}
    bf16, int8, *_ = BENCHES["runtimes"].targets(figures)
    assert (bf16.reached, int8.reached, int8.found) == (True, False, "no such runtime ran")
    ran["openvino-int8"] = of_runtime(14.0)
    assert len(report := BENCHES["runtimes"].targets(figures)) == 8  # of the fastest, and of the fastest without int8
    assert [target.reached for target in report[:2]] == [True, False]


def test_ratios_are_of_the_same_round():
    times = Times({"slow": [2.0, 20.0, 200.0], "fast": [1.0, 10.0, 50.0]})
    assert times.ratio("slow", "fast") == 2
    assert times.median("slow") == 20


def test_rounds_run_all_in_orders_of_their_own():
    run: list[str] = []
    in_turn({name: partial(run.append, name) for name in "abc"}, rounds=20)
    rounds = ["".join(run[at : at + 3]) for at in range(0, len(run), 3)]
    assert len(rounds) == 21
    assert all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) == 6


def test_failing_benchmark_is_reported(tmp_path, monkeypatch):
    tiny = Bench(("--rounds", "x"), (), BENCHES["scaling"].targets, BENCHES["scaling"].draw)
    monkeypatch.setitem(BENCHES, "scaling", tiny)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "scaling", "--out", str(tmp_path)])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    (target,) = json.loads((tmp_path / "benchmarks.json").read_text())["targets"]
    assert (target["found"], target["reached"]) == ("failed", False)


def test_growth_is_the_power():
    assert growth({1: 3.0, 2: 6.0, 8: 24.0}) == pytest.approx(1)
    assert growth({1: 1.0, 4: 16.0}) == pytest.approx(2)
    assert steepest({1: 1.0, 2: 2.0, 4: 8.0}) == pytest.approx(2)


def test_intervals_that_hold_what_they_promise():
    random = np.random.default_rng(0)
    counts = random.uniform(0, 500, 400)
    truths = counts + (counts + 10) * random.normal(0, 0.2, 400)
    inside, halves = covered(counts.tolist(), truths.tolist(), 0.9)
    assert np.mean(inside) == pytest.approx(0.9, abs=0.02)
    assert np.array(halves) / (counts + 10) == pytest.approx(np.full(400, 0.2 * 1.645), abs=0.08)


def test_exits_worth_asking():
    made = [Point(str(n), str(n), "mlp", n, error, True) for n, error in enumerate((50.0, 49.5, 48.9, 48.0, 47.8))]
    assert worth_asking(made, 1.0) == ["0", "2", "4"]
    assert worth_asking([Point("a", "1", "mlp", 1, 9.0, False), *made], 0.0) == ["0", "1", "2", "3", "4"]


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_a_processor(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["bench_gpu", "--device", "cpu", "--quick", "--json", str(path)])
    bench_gpu.main()
    figures = json.loads(path.read_text())
    assert figures["eager"]["latency_ms"].keys() == figures["eager"]["counts"].keys()
    assert max(figures["eager"]["off_float32"].values()) == 0
    assert set(figures["eager"]["images_a_second"]) == set(figures["training_step"]["seconds"]) == {"1", "2"}


def test_textures_without_people_are_seeded(monkeypatch):
    monkeypatch.setattr(bench_empty, "CANVAS", (96, 64))
    first, again = (list(bench_empty.textures(12)) for _ in range(2))
    assert all(image.shape == (64, 96, 3) and image.dtype == np.uint8 for image in first)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert np.mean([image.std() for image in first]) > 20
