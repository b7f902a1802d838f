"""A run that was killed goes on: no row is lost, none is there twice, and all are as if nothing had happened."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image
from videos import make_video, tone

from crowdexit.calibration.intervals import Intervals
from crowdexit.cli.main import app
from crowdexit.errors import OptionError
from crowdexit.inference.policies import Confident, DeepestThatFits
from crowdexit.jobs import rows as rows_module
from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.output import OutputError, part_of
from crowdexit.jobs.resume import ResumeError, note_of
from crowdexit.utils import command

OPTIONS = {"fps": 10, "batch": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> list[Path]:
    """Two videos with an image between them, and the first once more."""
    folder = tmp_path_factory.mktemp("inputs")
    times = [i / 10 for i in range(23)]
    first = make_video(folder / "a.mp4", times, audio=tone(2.5, begin=1))
    second = make_video(folder / 'b "or"\nb.mkv', times[:9], key_every=3)
    image = Path(__file__).parent.parent.parent / "crowdexit" / "samples" / "street.jpg"
    shutil.copy(image, folder / "p.jpg")
    return [first, folder / "p.jpg", second, first]


def read(out: Path, format: str) -> list[dict]:
    """The rows without what a clock says."""
    if format == "parquet":
        rows = pq.read_table(out).to_pylist()
    elif format == "csv":
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    for row in rows:
        del row["latency_ms"]
        for one in row.get("exits", []):
            del one["latency_ms"]
    return rows


def whole_lines(part: Path) -> bytes:
    """What stands in a file, but for a last line that is not whole."""
    data = part.read_bytes() if part.exists() else b""
    return data[: data.rfind(b"\n") + 1]


class Stopped(Exception):
    pass


def stop_after(counter, monkeypatch, batches: int, part: str = "answers") -> None:
    """The counter fails at a batch."""
    answers, left = getattr(type(counter), part), batches

    def failing(self, *arguments, **options):
        nonlocal left
        left -= 1
        if left < 0:
            raise Stopped
        return answers(self, *arguments, **options)

    monkeypatch.setattr(type(counter), part, failing)


@pytest.mark.parametrize("format", ["json", "csv", "parquet"])
def test_wherever_it_was_stopped(counter, inputs, tmp_path, monkeypatch, format):
    whole = tmp_path / "whole"
    count_inputs(counter, inputs, CountOptions(format=format, out=whole, **OPTIONS))
    expected = read(whole, format)
    assert len(expected) == 23 + 1 + 9 + 23
    assert not part_of(whole).exists()
    assert not note_of(whole).exists()

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(counter, patch, 11)
        with pytest.raises(Stopped):
            count_inputs(counter, inputs, CountOptions(format=format, out=out, **OPTIONS))
    assert not out.exists()
    left, note = part_of(out).read_bytes(), note_of(out).read_bytes()
    ends = [i + 1 for i, byte in enumerate(left) if byte == 10]
    for cut in [
        0,
        1,
        ends[0],
        ends[0] + 5,
        ends[2],
        ends[3],
        ends[4] - 1,
        ends[22],
        ends[23],
        ends[24] + 40,
        len(left),
    ]:
        part_of(out).write_bytes(left[:cut])
        note_of(out).write_bytes(note)
        assert count_inputs(counter, inputs, CountOptions(format=format, out=out, resume=True, **OPTIONS)) == len(
            expected
        )
        assert read(out, format) == expected, cut
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_killed(counter, inputs, tmp_path, format):
    """A process that is killed at several moments, against one that is not."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    count_inputs(counter, inputs[::2], CountOptions(format=format, out=whole, **OPTIONS))
    command = [sys.executable, str(Path(__file__).parents[1] / "count_tiny.py"), "0.2", str(out), format]
    command += [str(path) for path in inputs[::2]]
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests, tests.parent, tests.parent.parent)))
    for rows in (1, 9):
        before = whole_lines(part_of(out))
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths})
        try:
            deadline = time.monotonic() + 120
            while not (part_of(out).exists() and part_of(out).read_bytes().count(b"\n") >= rows):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
        assert part_of(out).read_bytes().startswith(before)  # to the hundredth of a millisecond
        assert not out.exists()
    before = whole_lines(part_of(out))
    count_inputs(counter, inputs[::2], CountOptions(format=format, out=out, resume=True, **OPTIONS))
    assert format == "parquet" or out.read_bytes().startswith(before)
    assert read(out, format) == read(whole, format)


def test_auto_resumes_with_the_selected_runtime(counter, inputs, tmp_path, monkeypatch):
    """By now it might pick another, whose rows would not go with those that are there."""
    out = tmp_path / "rows.csv"
    with monkeypatch.context() as patch:
        stop_after(counter, patch, 3)
        with pytest.raises(Stopped):
            count_inputs(counter, inputs[:1], CountOptions(format="csv", out=out, fps=10))
    note, loaded = note_of(out).read_text(), []
    monkeypatch.setattr(
        "crowdexit.inference.counter.load", lambda model, runtime, **_: loaded.append(runtime) or counter
    )
    arguments = ["count", str(inputs[0]), "--fps", "10", "--out", str(out), "--resume"]
    for damaged in ("{", "[]", json.dumps({"runtime": "abacus"}), json.dumps({"runtime": ["eager"]})):
        note_of(out).write_text(damaged)
        assert command.run(app, arguments) == 2
    note_of(out).write_text(note)
    assert command.run(app, arguments) == 0
    assert loaded == ["auto"] * 4 + ["eager"]
    assert len(read(out, "csv")) == 23


def test_what_is_done_is_not_done_again(counter, inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(counter, patch, 8)
        with pytest.raises(Stopped):
            count_inputs(counter, inputs, CountOptions(format="json", out=out, **OPTIONS))
    batches = 0
    answers = type(counter).answers

    def counting(self, batch, **options):
        nonlocal batches
        batches += len(batch.scenes)
        return answers(self, batch, **options)

    monkeypatch.setattr(type(counter), "answers", counting)
    monkeypatch.setattr(type(counter), "count", None)  # of the image
    count_inputs(counter, inputs, CountOptions(format="json", out=out, resume=True, **OPTIONS))
    assert batches == 1 + 23


def test_another_run_is_refused_in_one_line(counter, inputs, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_after(counter, patch, 2)
        with pytest.raises(Stopped):
            count_inputs(counter, inputs, CountOptions(format="json", out=out, **OPTIONS))
    part = part_of(out).read_bytes()
    with pytest.raises(OptionError, match=r"an interrupted run; resume it with resume, or delete .*out\.part"):
        count_inputs(counter, inputs, CountOptions(format="json", out=out, **OPTIONS))
    for change, line in [
        ({"fps": 5}, r"different fps \(10\);"),
        ({"smooth": 1.0}, r"different smooth \(2\.0\)"),
        ({"start": 1.0, "exit": "V1"}, r"different exit \(auto\), start \(0\.0\)"),
        ({"late": "fail"}, r"late fail: nothing is late without deadline_ms"),
        ({"late": "fail", "deadline_ms": 9.0, "batch": 1}, "resuming needs distinct files"),
        ({"policy": DeepestThatFits(0.9), "deadline_ms": 9.0, "batch": 1}, r"different deadline_ms, policy \(Anytime"),
        ({"audio": inputs[0]}, "belongs to one"),
        ({"format": "csv"}, r"different format \(json\)"),
    ]:
        with pytest.raises((ResumeError, OptionError), match=line) as caught:
            count_inputs(
                counter, inputs, CountOptions(**({"format": "json", "out": out, "resume": True} | OPTIONS | change))
            )
        assert "\n" not in str(caught.value)
    with pytest.raises(ResumeError, match="different inputs"):
        count_inputs(counter, inputs[:1], CountOptions(format="json", out=out, resume=True, **OPTIONS))
    with monkeypatch.context() as patch:
        parameter = next(counter.network.parameters())
        patch.setattr(parameter, "data", parameter.data + 1)
        with pytest.raises(ResumeError, match="different model"):
            count_inputs(counter, inputs, CountOptions(format="json", out=out, resume=True, **OPTIONS))
    with monkeypatch.context() as patch:
        patch.setattr(counter.chain, "runtime", "another")
        with pytest.raises(ResumeError, match=r"different runtime \(eager\)"):
            count_inputs(counter, inputs, CountOptions(format="json", out=out, resume=True, **OPTIONS))
    # What would write over it without being able to go on does not, either.
    with pytest.raises(OptionError, match="an interrupted run"):
        count_inputs(counter, inputs, CountOptions(out=out, **OPTIONS))
    assert part_of(out).read_bytes() == part
    for bad in (b"{}\n", b'{"source": "x", "frame": 1}\n', b"\xff\n", b"[]\n"):
        part_of(out).write_bytes(bad)
        with pytest.raises(ResumeError, match="rows are not of these inputs"):
            count_inputs(counter, inputs, CountOptions(format="json", out=out, resume=True, **OPTIONS))
    note_of(out).write_text("[")
    with pytest.raises(ResumeError, match="settings are unknown"):
        count_inputs(counter, inputs, CountOptions(format="json", out=out, resume=True, **OPTIONS))


def test_what_cannot_go_on(counter, inputs, tmp_path):
    for options in ({}, {"out": tmp_path / "o"}, {"format": "json"}):
        with pytest.raises(OptionError, match="resume: only rows"):
            count_inputs(counter, inputs[:1], CountOptions(resume=True, **options))
    with pytest.raises(OptionError, match="only rows can"):
        count_inputs(
            counter,
            inputs[:1],
            CountOptions(resume=True, format="csv", out=tmp_path / "o", annotate=tmp_path / "annotated.mp4"),
        )
    with pytest.raises(OptionError, match="name a file"):
        count_inputs(counter, inputs[:1], CountOptions(format="parquet"))
    with pytest.raises(OptionError, match="a budget covers all images of one run"):
        count_inputs(counter, [inputs[1]], CountOptions(budget_ms=1e4, resume=True, format="csv", out=tmp_path / "o"))


@pytest.mark.parametrize("options", [{"policy": Confident(share=0.5)}, {"deadline_ms": 1e5, "late": "fail"}])
def test_policies_and_deadlines_go_on(counter, inputs, tmp_path, monkeypatch, options):
    """With all the time in the world, the rows are the same however the frames were counted."""
    monkeypatch.setattr(counter.predictor, "intervals", Intervals(0.9, dict.fromkeys(counter.exits, 0.3)))
    count_inputs(counter, inputs[:1], CountOptions(format="json", out=tmp_path / "whole", fps=10, **options))
    with monkeypatch.context() as patch:
        part = "answers" if "policy" in options else "count"
        stop_after(counter, patch, 3, part)
        with pytest.raises(Stopped):
            count_inputs(counter, inputs[:1], CountOptions(format="json", out=tmp_path / "out", fps=10, **options))
    assert note_of(tmp_path / "out").exists()
    count_inputs(counter, inputs[:1], CountOptions(format="json", out=tmp_path / "out", fps=10, resume=True, **options))
    assert read(tmp_path / "out", "json") == read(tmp_path / "whole", "json")


def test_parquet_is_made_in_groups(counter, inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(rows_module, "_ROW_GROUP", 10)
    count_inputs(counter, inputs, CountOptions(format="parquet", out=tmp_path / "rows.parquet", fps=10))
    count_inputs(counter, inputs, CountOptions(format="json", out=tmp_path / "rows.json", fps=10))
    file = pq.ParquetFile(tmp_path / "rows.parquet")
    assert file.num_row_groups == 6
    assert [(f.name, str(f.type)) for f in file.schema_arrow] == [
        ("source", "string"),
        ("frame", "int64"),
        ("time_s", "double"),
        ("count", "double"),
        ("low", "double"),
        ("high", "double"),
        ("smoothed", "double"),
        ("chosen_exit", "string"),
        ("latency_ms", "double"),
        ("audio", "string"),
        ("familiar", "bool"),
        ("warnings", "string"),
    ]
    lines = read(tmp_path / "rows.json", "json")
    for row, line in zip(read(tmp_path / "rows.parquet", "parquet"), lines, strict=True):
        line = line | {"warnings": "; ".join(line["warnings"])}
        assert row == {key: line.get(key) for key in row}  # the counter is not calibrated: no interval
    assert read(tmp_path / "rows.parquet", "parquet")[23]["frame"] is None


@pytest.mark.parametrize("format", ["json", "csv", "parquet"])
def test_rows_with_warnings_go_on(counter, inputs, tmp_path, format, monkeypatch):
    """Both what was written before the stop and what comes after it."""
    pages = [Image.new("RGB", (64, 48), colour) for colour in ("grey", "white")]
    for name in ("a.tif", "z.tif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    files = [tmp_path / "a.tif", inputs[0], tmp_path / "z.tif"]
    count_inputs(counter, files, CountOptions(format=format, out=tmp_path / "whole", **OPTIONS))
    with monkeypatch.context() as patch:
        stop_after(counter, patch, 3)
        with pytest.raises(Stopped):
            count_inputs(counter, files, CountOptions(format=format, out=tmp_path / "out", **OPTIONS))
    count_inputs(counter, files, CountOptions(format=format, out=tmp_path / "out", resume=True, **OPTIONS))
    rows = read(tmp_path / "out", format)
    assert rows == read(tmp_path / "whole", format)
    warned = [bool(row["warnings"]) for row in rows]
    assert warned == [True] + [False] * 23 + [True]


def test_a_full_disk_leaves_what_can_go_on(counter, inputs, tmp_path, monkeypatch):
    """The note of what the run is stays as it was, or there is none."""
    out, write = tmp_path / "out", Path.write_text

    def full(self, *arguments, **options):
        write(self, "")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match="the disk is full"):
            count_inputs(counter, inputs[:1], CountOptions(format="json", out=out, **OPTIONS))
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        stop_after(counter, patch, 2)
        with pytest.raises(Stopped):
            count_inputs(counter, inputs[:1], CountOptions(format="json", out=out, **OPTIONS))
    note = note_of(out).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        stop_after(counter, patch, 1)
        with pytest.raises((Stopped, OutputError)):
            count_inputs(counter, inputs[:1], CountOptions(format="json", out=out, resume=True, **OPTIONS))
    assert note_of(out).read_bytes() == note
    assert count_inputs(counter, inputs[:1], CountOptions(format="json", out=out, resume=True, **OPTIONS)) == 23
