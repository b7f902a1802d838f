"""The demo: every exit against the truth, and a clip to look at."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from rich.console import Console

from crowdexit.data.log_mel import read_audio
from crowdexit.jobs import demo
from crowdexit.jobs.demo import SAMPLES, DemoError, run_demo, true_counts
from crowdexit.video.decode import Span
from crowdexit.video.frames import read_frames


def test_demo(counter, tmp_path):
    screen = io.StringIO()
    run_demo(counter, tmp_path / "out", Console(file=screen, width=200))
    text = screen.getvalue()
    with (tmp_path / "out" / "clip-counted.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    truth = true_counts(SAMPLES / "clip.csv")
    assert [int(r["frame"]) for r in rows] == list(range(0, 100, 5))
    assert [int(r["true_count"]) for r in rows] == [truth[i] for i in range(0, 100, 5)]
    counted = [float(r["final_count"]) for r in rows]
    frame = next(iter(read_frames(SAMPLES / "clip.mp4")))
    assert counted[0] == pytest.approx(counter.count(frame.image, frame.waveform).count, abs=0.006)
    error = np.abs(np.array(counted) - [truth[i] for i in range(0, 100, 5)]).mean()
    (final,) = [line for line in text.splitlines() if " final " in line]
    assert [cell.strip() for cell in final.split("│")][2:4] == [f"{np.mean(counted):.1f}", f"{error:.1f}"]
    assert all(any(f" {name} " in line for line in text.splitlines()) for name in counter.exits)
    assert "simulated" in text
    assert f"Truth: {np.mean([truth[i] for i in range(0, 100, 5)]):.1f}" in text
    share = error / np.mean([truth[i] for i in range(0, 100, 5)])
    assert share > demo.POOR  # an untrained network
    assert f"final is off by {share:.0%} of the truth here" in text
    assert str(tmp_path / "out" / "clip-counted.mp4") in text.splitlines()[-1]

    drawn = list(read_frames(tmp_path / "out" / "clip-counted.mp4", Span(2)))
    assert len(drawn) == 20
    assert drawn[0].image.shape == (576, 768, 3)
    own, _ = read_audio(SAMPLES / "clip.mp4")
    kept, _ = read_audio(tmp_path / "out" / "clip-counted.mp4")
    length = min(own.shape[1], kept.shape[1])
    assert length > 9.9 * 16_000
    assert np.corrcoef(own[0, :length], kept[0, :length])[0, 1] > 0.99
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clip-counted.csv", "clip-counted.mp4"]


def test_a_good_count_has_no_warning(counter, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "POOR", np.inf)
    screen = io.StringIO()
    run_demo(counter, tmp_path, Console(file=screen, width=200))
    assert "Truth: " in screen.getvalue()
    assert "off by" not in screen.getvalue()


def test_folders_and_samples_that_are_not_there(counter, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DemoError, match="cannot be made"):
        run_demo(counter, tmp_path / "file", Console(file=io.StringIO()))
    monkeypatch.setattr(demo, "SAMPLES", tmp_path)
    with pytest.raises(DemoError, match="missing or damaged"):
        run_demo(counter, tmp_path / "out", Console(file=io.StringIO()))
