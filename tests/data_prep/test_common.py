"""What the shared machinery of preparation does when things around it go wrong."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import h5py
import numpy as np
import pytest

from crowdexit.data.store import Store, StoredSample
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command
from data_prep.common import Task, divided, prepare

TASKS = [Task(f"id_{n:03}", "train") for n in range(40)]


def make(task):
    image, points = np.zeros(9, np.uint8), np.zeros((0, 2), np.float32)
    return StoredSample(task.id, task.split, image, points, width=3, height=3, count=0)


def die_at_last(task):
    if task == TASKS[-1]:
        os._exit(1)
    return make(task)


def test_a_dead_worker_is_one_line_and_loses_nothing(tmp_path):
    target = tmp_path / "set.h5"
    with pytest.raises(CrowdExitError, match="worker process died"):
        prepare(target, TASKS, die_at_last, settings="", jobs=2)
    assert not target.exists()
    report = prepare(target, TASKS, make, settings="", jobs=1)
    assert report.resumed > 0
    assert len(Store(target).ids("train")) == len(TASKS)


def test_two_runs_into_one_file(tmp_path):
    with h5py.File(tmp_path / "set.h5.part", "w") as other:
        other["mine"] = 1
        script = (
            "import sys; from pathlib import Path; from data_prep.common import *\n"
            "prepare(Path(sys.argv[1]), [], print, settings='')"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "set.h5"], capture_output=True, text=True, check=False
        )
        assert done.stderr.splitlines()[-1].endswith("another run is writing it")
        assert "mine" in other


def test_ctrl_c(tmp_path):
    """To the whole process group, as a terminal sends it: code 130, no traceback, no process left behind."""
    script = (
        "import sys, time, typer\nfrom pathlib import Path\nfrom data_prep import common\n"
        "app = typer.Typer()\n"
        "@app.command()\n"
        "def main(target: Path) -> None:\n"
        "    tasks = [common.Task(str(n), 'train') for n in range(100)]\n"
        "    common.prepare(target, tasks, slow, settings='', jobs=2)\n"
        "def slow(task):\n"
        "    Path(sys.argv[1]).with_suffix('.started').touch()\n"
        "    time.sleep(0.3)\n"
        "    raise common.CrowdExitError('unusable')\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(common.run(app))\n"
    )
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, "script.py", "set.h5"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.getcwd()},  # noqa: PTH109
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "set.started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)  # ends when the last process has let go of stderr
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert "interrupted" in error


@pytest.mark.parametrize(
    ("number", "held"), [(1, 0), (2, 0), (3, 1), (4, 1), (10, 1), (14, 1), (16, 2), (100, 10), (1000, 100)]
)
def test_shares_of_few_and_many(number, held):
    names = [str(n) for n in range(number)]
    counts = Counter(divided(names, 0.1).values())
    assert counts == Counter({"train": number - 2 * held, "val": held, "test": held})
    one = Counter(divided(names, 0.1, test=False).values())
    assert one["test"] == 0
    assert one["val"] == (max(held, 1) if number > 1 else 0)


@pytest.mark.parametrize("script", ["shanghaitech", "disco", "cifar", "fashion_mnist", "gtzan", "ambience"])
@pytest.mark.parametrize("destination", [".", "", "/", "notes.txt/set.h5"])
def test_a_destination_is_checked_first(script, destination, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    app = importlib.import_module(f"data_prep.{script}").app
    assert command.run(app, ["nothing-there", destination]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a folder; name a file to write" in line or "notes.txt is a file, not a folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
