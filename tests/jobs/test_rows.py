"""From inputs to rows: the forms that others rely on, files that appear whole, and what is said of bad ones."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import struct
import sys
import wave
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from audio_files import write_wav
from PIL import Image
from videos import make_video, tone

from crowdexit.calibration.intervals import Intervals
from crowdexit.cli import main as cli
from crowdexit.data.image import ImageError, read_image
from crowdexit.data.mel import AudioError, AudioInput
from crowdexit.errors import CrowdExitError, OptionError
from crowdexit.inference.anytime import DeadlineMissed
from crowdexit.inference.counter import CrowdCounter
from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions
from crowdexit.jobs.output import OutputError, exclusive_lock, opened
from crowdexit.jobs.resume import ResumeError
from crowdexit.jobs.sources import SourceError
from crowdexit.runtimes.eager import Eager
from crowdexit.utils import command
from crowdexit.video.container import VideoError
from crowdexit.video.decode import Span
from crowdexit.video.frames import read_frames


@pytest.fixture
def street(image_file) -> Path:
    return image_file("street.jpg", width=256, height=128)


@pytest.fixture
def film(tmp_path) -> Path:
    return make_video(tmp_path / "film.mp4", [i / 10 for i in range(20)], audio=tone(2))


def write_audio(path: Path, audio) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((audio * 32767).astype("<i2").tobytes())
    return path


def json_lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_json_of_an_image(counter, street, capsys):
    assert count_inputs(counter, [street], CountOptions(format="json")) == 1
    out, err = capsys.readouterr()
    assert err == ""
    row = json.loads(out)
    assert list(row) == [
        "source",
        "model",
        "count",
        "chosen_exit",
        "latency_ms",
        "exits",
        "audio",
        "familiar",
        "warnings",
    ]
    assert (row["source"], row["model"], row["chosen_exit"]) == (str(street), "tiny", "final")
    assert [list(e) for e in row["exits"]] == [["exit", "count", "interval", "latency_ms"]] * 4
    assert [e["exit"] for e in row["exits"]] == ["V1", "AV1", "AV2", "final"]
    expected = counter.count(street)
    assert row["count"] == row["exits"][-1]["count"] == pytest.approx(expected.count, abs=0.006)
    assert row["count"] > 0
    latencies = [e["latency_ms"] for e in row["exits"]]
    assert latencies == sorted(latencies)


def test_json_of_mixed_inputs(counter, street, film, capsys):
    assert count_inputs(counter, [film, street], CountOptions(format="json", fps=2)) == 5
    *frames, image = json_lines(capsys.readouterr().out)
    assert [list(f) for f in frames] == [
        [
            "source",
            "frame",
            "time_s",
            "count",
            "interval",
            "smoothed",
            "chosen_exit",
            "latency_ms",
            "audio",
            "familiar",
            "warnings",
        ]
    ] * 4
    assert [(f["source"], f["frame"], f["time_s"]) for f in frames] == [
        (str(film), 0, 0.0),
        (str(film), 5, 0.5),
        (str(film), 10, 1.0),
        (str(film), 15, 1.5),
    ]
    assert image["source"] == str(street)
    assert "exits" in image


def test_csv(counter, street, film, tmp_path):
    out = tmp_path / "rows.csv"
    assert count_inputs(counter, [street, film], CountOptions(format="csv", out=out)) == 3
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [list(r) for r in rows] == [
        [
            "source",
            "frame",
            "time_s",
            "count",
            "low",
            "high",
            "smoothed",
            "chosen_exit",
            "latency_ms",
            "audio",
            "familiar",
            "warnings",
        ]
    ] * 3
    assert [(r["frame"], r["time_s"]) for r in rows] == [("", ""), ("0", "0.0"), ("10", "1.0")]
    assert float(rows[0]["count"]) == pytest.approx(counter.count(street).count, abs=0.006)


def test_every_row_has_its_interval(counter, street, film, tmp_path, capsys):
    """As images and as frames, in all formats: of the answer that was chosen."""
    widths = {"V1": 0.25, "final": 0.5}
    tool = CrowdCounter(
        counter.network, "tiny", runtime=Eager(), exits=["V1", "final"], intervals=Intervals(0.9, widths, widths, 20)
    )
    for exit, width in (("V1", 0.25), ("final", 0.5)):
        count_inputs(tool, [street, film], CountOptions(exit=exit, format="json"))
        image, *frames = json_lines(capsys.readouterr().out)
        said = [(image["count"], image["exits"][-1]["interval"]), *((f["count"], f["interval"]) for f in frames)]
        assert len(said) == 3
        for count, (low, high) in said:
            half = width * (count + 10)
            assert (low, high) == pytest.approx((max(0, count - half), count + half), abs=0.02)
        expected = [interval for _, interval in said]
        for format in ("csv", "parquet"):
            out = tmp_path / f"{exit}.{format}"
            count_inputs(tool, [street, film], CountOptions(exit=exit, format=format, out=out))
            rows = list(csv.DictReader(out.open())) if format == "csv" else pq.read_table(out).to_pylist()
            assert [[float(row["low"]), float(row["high"])] for row in rows] == expected
        count_inputs(tool, [street, film], CountOptions(exit=exit))
        _, *lines = capsys.readouterr().out.splitlines()
        for line, (low, high) in zip(lines, expected, strict=True):
            assert f" {low:.0f} to {high:.0f} " in line


@pytest.fixture
def pages(tmp_path) -> Path:
    """A TIFF of two pages, of which one is counted."""
    first, second = (Image.new("RGB", (256, 128), colour) for colour in ("grey", "white"))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    return tmp_path / "pages.tif"


WARNING = "2 pages in the file, only the first is counted"


def test_warnings_of_the_reader_stand_in_every_row(counter, street, pages, tmp_path, capsys):
    """In every format, also where the standard error is not looked at; of good images there are none."""
    report = f"warning: {pages}: {WARNING}"
    count_inputs(counter, [street, pages], CountOptions(format="json"))
    out, err = capsys.readouterr()
    assert [row["warnings"] for row in json_lines(out)] == [[], [WARNING]]
    assert err.splitlines() == [report]
    for format in ("csv", "parquet"):
        out = tmp_path / f"rows.{format}"
        count_inputs(counter, [street, pages], CountOptions(format=format, out=out))
        rows = list(csv.DictReader(out.open())) if format == "csv" else pq.read_table(out).to_pylist()
        assert [row["warnings"] for row in rows] == ["", WARNING]
        assert capsys.readouterr().err.splitlines() == [report]
    for inputs in ([pages], [pages, street]):
        count_inputs(counter, inputs)
        assert capsys.readouterr().err.splitlines() == [report]


def test_warnings_reach_callers_from_python(counter, street, pages):
    assert counter.count(pages).warnings == (WARNING,)
    assert counter.count(pages, deadline_ms=6e4).warnings == (WARNING,)
    assert {result.warnings for result in counter.stream(pages)} == {(WARNING,)}
    assert [result.warnings for result in counter.count_many([(street, None), (pages, None)])] == [(), (WARNING,)]
    ready = counter.prepare([(read_image(pages), None), (read_image(street).pixels, None)])
    assert [result.warnings for result in counter.answers(ready)] == [(WARNING,), ()]


def test_warnings_of_images_within_a_budget(counter, street, pages, monkeypatch, capsys):
    """The files are read here before the counter has them."""
    results = [counter.count(path) for path in (street, pages)]
    taken: list[object] = []

    def count_many(samples, **_):
        taken.extend(samples)
        return results

    monkeypatch.setattr(counter, "count_many", count_many)
    count_inputs(counter, [street, pages], CountOptions(format="json", budget_ms=1e5))
    assert [image.warnings for image, _ in taken] == [(), (WARNING,)]
    assert [row["warnings"] for row in json_lines(capsys.readouterr().out)] == [[], [WARNING]]


def test_warning_of_many_frames_is_printed_once(counter, film, monkeypatch, capsys):
    """It stands in the row of each of them."""
    prepare = counter.prepare

    def with_warning(samples):
        return prepare([(replace(image, warnings=("damaged",)), audio) for image, audio in samples])

    monkeypatch.setattr(counter, "prepare", with_warning)
    count_inputs(counter, [film], CountOptions(format="json", fps=5))
    out, err = capsys.readouterr()
    assert [row["warnings"] for row in json_lines(out)] == [["damaged"]] * 10
    assert err.splitlines() == [f"warning: {film} at 0.0 s: damaged"]


def test_table_of_one_image(counter, street, capsys):
    count_inputs(counter, [street], CountOptions(exit="AV2"))
    lines = capsys.readouterr().out.splitlines()
    marked = [line for line in lines if "chosen" in line]
    assert len(marked) == 1
    assert "AV2" in marked[0]
    assert [name for name in ("V1", "AV1", "AV2", "final") if any(f" {name} " in line for line in lines)] == [
        "V1",
        "AV1",
        "AV2",
    ]
    assert str(street) in lines[0]


def test_table_of_several(counter, street, film, capsys):
    count_inputs(counter, [street, film])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["source", "frame", "time", "s", "count", "interval", "smoothed", "exit", "ms"]
    assert len(rows) == 3
    assert len({len(line) for line in (header, *rows)}) == 1
    assert rows[2].split()[:3] == [str(film), "10", "1.00"]


def test_audio(counter, street, film, tmp_path, capsys):
    """The file beside an image is heard; --audio goes before it, and before a video's own."""

    def counts(*inputs, **options) -> list[float]:
        count_inputs(counter, inputs, CountOptions(format="json", **options))
        return [row["count"] for row in json_lines(capsys.readouterr().out)]

    loud = write_audio(tmp_path / "loud.wav", tone(3))
    quiet = write_audio(tmp_path / "quiet.wav", 0 * tone(3))
    expected = {None: counter.count(street).count} | {s: counter.count(street, s).count for s in (loud, quiet)}
    assert len({round(value, 2) for value in expected.values()}) == 3
    assert counts(street) == pytest.approx([expected[None]], abs=0.006)
    assert counts(street, audio=loud) == pytest.approx([expected[loud]], abs=0.006)
    quiet.rename(street.with_suffix(".wav"))
    assert counts(street) == pytest.approx([expected[quiet]], abs=0.006)
    assert counts(street, audio=loud) == pytest.approx([expected[loud]], abs=0.006)
    assert counts(film) != counts(film, audio=street.with_suffix(".wav"))
    with pytest.raises(OptionError, match="audio"):
        count_inputs(counter, [street, film], CountOptions(audio=loud))
    with pytest.raises(CrowdExitError, match="no such audio file"):
        count_inputs(counter, [street], CountOptions(audio=tmp_path / "none.wav"))


def test_broken_audio_beside_an_image_is_reported(counter, street, monkeypatch, capsys):
    street.with_suffix(".wav").write_bytes(b"RIFF")
    count_inputs(counter, [street], CountOptions(format="json"))
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert row["count"] == pytest.approx(counter.count(street).count, abs=0.006)
    assert row["audio"] == "unreadable"
    (warning,) = row["warnings"]
    assert "street.wav: not a readable audio file" in warning
    assert err.splitlines() == [f"warning: {street}: {warning}"]
    taken: list[object] = []
    monkeypatch.setattr(counter, "count_many", lambda samples, **_: taken.extend(samples) or [counter.count(street)])
    count_inputs(counter, [street], CountOptions(budget_ms=1e5))
    assert [audio for _, audio in taken] == [AudioInput(None, "unreadable", (warning,))]


def audio_of(counter, inputs, capsys, tmp_path, **options) -> list[str]:
    """The field ``audio`` of every row, the same in all formats."""
    count_inputs(counter, inputs, CountOptions(format="json", **options))
    found = [row["audio"] for row in json_lines(capsys.readouterr().out)]
    for format in ("csv", "parquet"):
        out = tmp_path / f"rows.{format}"
        count_inputs(counter, inputs, CountOptions(format=format, out=out, **options))
        rows = list(csv.DictReader(out.open())) if format == "csv" else pq.read_table(out).to_pylist()
        assert [row["audio"] for row in rows] == found
    return found


def test_every_row_says_whether_audio_was_used(counter, street, film, image_file, tmp_path, capsys):
    """``switched off``: the exit V1 stands before the audio joins the image."""
    audio = write_audio(tmp_path / "s.wav", tone(3))
    large = image_file("large.jpg", width=1024, height=256)
    assert audio_of(counter, [street, film], capsys, tmp_path, fps=1) == ["none", "used", "used"]
    assert audio_of(counter, [street], capsys, tmp_path, audio=audio) == ["used"]
    assert audio_of(counter, [street], capsys, tmp_path, audio=audio, exit="V1") == ["switched off"]
    assert audio_of(counter, [film], capsys, tmp_path, fps=1, exit="V1") == ["switched off"] * 2
    assert audio_of(counter, [large], capsys, tmp_path, audio=audio) == ["tiled"]
    assert audio_of(counter, [large], capsys, tmp_path) == ["none"]
    used = {result.exit: result.audio for result in counter.stream(street, audio)}
    assert used == {"V1": "switched off", "AV1": "used", "AV2": "used", "final": "used"}
    assert counter.count(street, audio).audio == "used"
    assert counter.count(street, AudioInput(None, "switched off")).audio == "switched off"
    assert [result.audio for result in counter.count_many([(street, audio), (large, audio)])] == ["used", "tiled"]


def test_unused_audio_is_reported(counter, street, image_file, tmp_path, capsys):
    audio = write_audio(tmp_path / "s.wav", tone(3))
    large = image_file("large.jpg", width=1024, height=256)
    for path, exit, reason in ((large, "auto", "cut into tiles"), (street, "V1", "the exit used has no audio input")):
        count_inputs(counter, [path], CountOptions(audio=audio, exit=exit))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {audio}: not used")
        assert reason in line
    count_inputs(counter, [street], CountOptions(audio=audio))
    assert capsys.readouterr().err == ""


def test_float_audio_of_any_scale_beside_an_image(counter, street, tmp_path, capsys):
    """The count of the same sound in ±1, and a warning in the row."""
    usual = write_wav(tmp_path / "a.wav", tone(1), floats=True)
    loud = write_wav(tmp_path / "b.wav", tone(1) * 32_768, floats=True)
    rows = []
    for audio in (usual, loud):
        count_inputs(counter, [street], CountOptions(audio=audio, format="json"))
        out, err = capsys.readouterr()
        rows.append(json.loads(out))
    assert rows[0]["count"] == rows[1]["count"]
    assert rows[0]["warnings"] == []
    (warning,) = rows[1]["warnings"]
    assert "16-bit integers" in warning
    assert err.splitlines() == [f"warning: {street}: {warning}"]


def test_audio_with_non_finite_values_is_named(counter, street, tmp_path):
    path = write_wav(tmp_path / "nan.wav", np.full(16_000, np.nan), floats=True)
    with pytest.raises(AudioError, match=r"nan\.wav"):
        count_inputs(counter, [street], CountOptions(audio=path))


def png_of_claimed_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data does not have."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def bad_images(good: bytes) -> dict[str, bytes]:
    tiny = io.BytesIO()
    Image.new("RGB", (1, 1)).save(tiny, "PNG")
    return {
        "empty.jpg": b"",
        "head-only.jpg": good[:20],
        "text.jpg": b"these are words\n",
        "tiny.png": tiny.getvalue(),
        "truncated.jpg": good[: len(good) // 2],
        "vast.png": png_of_claimed_size(100_000, 100_000),
        "wide.png": png_of_claimed_size(20_000, 8_000),
    }


def test_bad_image_named_directly_is_a_one_line_error(counter, street, tmp_path):
    for name, data in bad_images(street.read_bytes()).items():
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(CrowdExitError) as caught:
            count_inputs(counter, [path])
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_bad_files_of_a_folder_are_reported_and_skipped(counter, street, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    bad = bad_images(street.read_bytes()) | {"film.mp4": b"no film"}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    with pytest.raises(SourceError, match="none of the files"):
        count_inputs(counter, [folder])
    report = capsys.readouterr().err.splitlines()
    assert len(report) == len(bad)
    assert all(sum(f"{folder / name}:" in line for line in report) == 1 for name in bad)
    street.rename(folder / "street.jpg")
    make_video(folder / "z.mp4", [0, 0.1])
    assert count_inputs(counter, [folder], CountOptions(format="json")) == 2
    out, err = capsys.readouterr()
    assert [row["source"] for row in json_lines(out)] == [str(folder / "street.jpg"), str(folder / "z.mp4")]
    assert len(err.splitlines()) == len(bad)


def test_what_is_no_fault_of_a_file_ends_the_run(counter, street, capsys):
    with pytest.raises(CrowdExitError, match="no exit 'V9'"):
        count_inputs(counter, [street.parent], CountOptions(exit="V9"))
    assert capsys.readouterr() == ("", "")


def test_out_appears_whole(counter, street, film, tmp_path):
    out = tmp_path / "rows.json"
    with opened(out) as file:
        print("{}", file=file)
        assert not out.exists()
    assert out.read_text() == "{}\n"

    def interrupted(say: str) -> None:
        with opened(out) as file:
            print(say, end="", file=file)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted("half")
    assert out.read_text() == "{}\n"  # as it was
    assert (tmp_path / "rows.json.part").read_text() == "half"
    with pytest.raises(KeyboardInterrupt):
        interrupted("")
    assert not (tmp_path / "rows.json.part").exists()


def test_rows_before_an_error_stay(counter, street, film, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"words")
    out = tmp_path / "rows.json"
    with pytest.raises(ImageError, match=r"bad\.jpg.*rows\.json\.part"):
        count_inputs(counter, [film, bad], CountOptions(format="json", out=out))
    assert not out.exists()
    assert len(json_lines((tmp_path / "rows.json.part").read_text())) == 2
    with pytest.raises(ImageError) as caught:
        count_inputs(counter, [bad], CountOptions(format="json", out=tmp_path / "other.json"))
    assert "part" not in str(caught.value)
    assert not list(tmp_path.glob("other*"))


def test_out_that_cannot_be(counter, street, tmp_path):
    for out, line in {
        tmp_path: "a folder",
        tmp_path / "nowhere" / "rows.csv": "cannot be written",
        street: "would be overwritten",
    }.items():
        before = street.read_bytes()
        with pytest.raises(CrowdExitError, match=line):
            count_inputs(counter, [street], CountOptions(out=out))
        assert street.read_bytes() == before
    with pytest.raises(OutputError, match="no format 'xml'"):
        count_inputs(counter, [street], CountOptions(format="xml"))  # type: ignore[arg-type]


@pytest.mark.parametrize("out", [".", "", "/", "..", "rows.csv/more.csv", "x" * 300 + ".csv"])
def test_out_is_checked_before_anything_is_loaded(street, tmp_path, monkeypatch, capsys, out):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("mine")
    before = {*tmp_path.iterdir()}
    monkeypatch.setattr("crowdexit.inference.counter.load", lambda *_, **__: pytest.fail("loaded"))
    assert command.run(cli.app, ["count", str(street), "--out", out]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert {*tmp_path.iterdir()} == before


def test_a_folder_is_right_where_several_drawings_go(counter, street, film, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"density \.: a folder; name a file to write"):
        count_inputs(counter, [street], CountOptions(density=Path()))
    with pytest.raises(OptionError, match=r"annotate /: a folder; name a file to write"):
        count_inputs(counter, [film], CountOptions(annotate=Path("/")))
    (tmp_path / "taken").write_text("")
    with pytest.raises(OptionError, match=r"density .*: a file; name a folder to write to"):
        count_inputs(counter, [street, film], CountOptions(density=tmp_path / "taken"))
    drawings = tmp_path / "drawings"
    drawings.mkdir()
    monkeypatch.chdir(drawings)
    count_inputs(counter, [street, film], CountOptions(density=Path()))
    assert {path.suffix for path in drawings.iterdir()} == {".png", ".mp4"}


def test_command_line_names_its_flags_in_errors(street, tmp_path, monkeypatch, capsys):
    """The library names the options themselves."""
    monkeypatch.setattr("crowdexit.inference.counter.load", lambda *_, **__: pytest.fail("loaded"))
    folder = str(tmp_path / "maps")
    for arguments, line in [
        (["--late", "fail"], "--late fail: nothing is late without --deadline-ms"),
        (["--format", "parquet"], "--format parquet: name a file with --out"),
        (["--resume"], "--resume: only rows of files go on, in --out as csv, json or parquet"),
        (["--density", folder, "--budget-ms", "9"], "without --exit, --deadline-ms, --policy or --density"),
        (["--density", str(street)], f"--density {street}: this is an input, it would be overwritten"),
        (["--annotate", folder], f"--annotate {folder}: this is for videos; of images, --density shows the map"),
    ]:
        assert command.run(cli.app, ["count", str(street), *arguments]) == 2
        (printed,) = capsys.readouterr().err.splitlines()
        assert printed.startswith("error: ")
        assert line in printed
    with pytest.raises(OptionError, match=r"^late fail: nothing is late without deadline_ms$"):
        CountOptions(late="fail")


def test_names_that_a_spreadsheet_would_run(counter, image_file, tmp_path, monkeypatch):
    """In CSV they begin with an apostrophe, and a stopped run goes on behind them; elsewhere they stay."""
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.jpg", "+1.jpg", "-1.jpg", "@x.jpg", "a=b.jpg"]
    for name in names:
        image_file(name, width=64, height=64)
    out = tmp_path / "rows.csv"
    count_inputs(counter, names, CountOptions(format="csv", out=out))

    def named() -> list[str]:
        with out.open(newline="") as file:
            return [row["source"] for row in csv.DictReader(file)]

    assert named() == ["'=1+1.jpg", "'+1.jpg", "'-1.jpg", "'@x.jpg", "a=b.jpg"]
    out.unlink()
    count, done = CrowdCounter.count, []

    def stopped(self, *args, **options):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(args)
        return count(self, *args, **options)

    with monkeypatch.context() as stopping:
        stopping.setattr(CrowdCounter, "count", stopped)
        with pytest.raises(KeyboardInterrupt):
            count_inputs(counter, names, CountOptions(format="csv", out=out))
    count_inputs(counter, names, CountOptions(format="csv", out=out, resume=True))
    assert named() == ["'=1+1.jpg", "'+1.jpg", "'-1.jpg", "'@x.jpg", "a=b.jpg"]
    count_inputs(counter, names[:1], CountOptions(format="json", out=tmp_path / "rows.json"))
    assert json.loads((tmp_path / "rows.json").read_text())["source"] == names[0]


def test_impossible_deadlines_are_reported(counter, street, film, tmp_path, capsys):
    rows = count_inputs(
        counter, [street, film], CountOptions(deadline_ms=1e-3, format="json", out=tmp_path / "rows.json")
    )
    first, *_, last = capsys.readouterr().err.splitlines()
    size = "×".join(map(str, counter.size))
    pattern = (
        rf"warning: no exit is as fast as 0\.001 ms here: the first, V1, takes about \d+ ms for an image of {size}"
    )
    assert re.fullmatch(pattern, first)
    assert last == f"warning: answered after the deadline of 0.001 ms ({rows} of {rows} rows)"
    count_inputs(counter, [street, film], CountOptions(deadline_ms=1e5, format="json", out=tmp_path / "rows2.json"))
    assert "deadline" not in capsys.readouterr().err


def test_density_of_an_image(counter, street, tmp_path):
    count_inputs(counter, [street], CountOptions(density=tmp_path / "map.npy", out=tmp_path / "o"))
    density = np.load(tmp_path / "map.npy", allow_pickle=False)
    result = counter.count(street)
    assert density.dtype == np.float32
    assert density.shape == (8, 16)
    assert float(density.sum()) == pytest.approx(result.count, rel=1e-4)
    count_inputs(counter, [street], CountOptions(density=tmp_path / "map.png", out=tmp_path / "o"))
    with Image.open(tmp_path / "map.png") as image:
        assert (image.format, image.size) == ("PNG", (256, 128))
        assert np.abs(np.asarray(image).astype(int) - np.asarray(Image.open(street))).max() > 20


def test_density_of_a_video(counter, film, tmp_path):
    count_inputs(counter, [film], CountOptions(density=tmp_path / "counted.mp4", out=tmp_path / "o", fps=5))
    frames = list(read_frames(tmp_path / "counted.mp4", Span(100)))
    assert [f.time_s for f in frames] == pytest.approx([i / 5 for i in range(10)], abs=0.002)
    assert frames[0].waveform is not None


def test_densities_of_several_go_into_a_folder(counter, street, film, tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    for name in ("street.png", "a/street.jpg"):
        Image.open(street).save(tmp_path / "in" / name)
    folder = tmp_path / "maps"
    count_inputs(
        counter, [tmp_path / "in", tmp_path / "in" / "a", film], CountOptions(density=folder, out=tmp_path / "o")
    )
    assert sorted(p.name for p in folder.iterdir()) == ["film.mp4", "street-2.png", "street.png"]


def test_densities_that_cannot_be(counter, street, film, tmp_path, capsys):
    for inputs, path, options, line in [
        ([street], "map.mp4", {}, r"of an image this ends in \.png or \.npy"),
        ([film], "map.png", {}, r"of a video this ends in \.mp4"),
        ([street, film], "map.png", {}, "has to be a folder"),
        ([street], "map.png", {"exit": "V1"}, "the exit V1 makes no map"),
        ([street], "nowhere/map.png", {}, "cannot be written"),
    ]:
        with pytest.raises((OptionError, OutputError), match=line):
            count_inputs(counter, inputs, CountOptions(density=tmp_path / path, **options))
    with pytest.raises(OptionError, match="would be overwritten"):
        count_inputs(counter, [film], CountOptions(density=film))
    capsys.readouterr()
    count_inputs(counter, [street], CountOptions(density=tmp_path / "map.png", deadline_ms=1e-3))
    assert "no density map" in capsys.readouterr().err
    assert not (tmp_path / "map.png").exists()


def test_a_deadline_begins_with_a_warm_network(counter, street, monkeypatch, capsys):
    order: list[str] = []
    count = counter.count
    monkeypatch.setattr(counter, "warm_up", lambda exit: order.append(f"warm {exit}"))
    monkeypatch.setattr(counter, "count", lambda *given, **by: order.append("count") or count(*given, **by))
    count_inputs(counter, [street], CountOptions(format="json"))
    count_inputs(counter, [street, street], CountOptions(format="json", deadline_ms=6e4))
    assert order == ["count", "warm auto", "count", "count"]


def test_frames_without_an_answer_in_time_have_no_row(counter, film, tmp_path, monkeypatch, capsys):
    """The others have; told are the first, and how many there were. Only where none has one is that an error."""
    count, asked = counter.count, []

    def late_now_and_then(*given, deadline_ms, **by):
        asked.append(deadline_ms)
        return count(*given, deadline_ms=1e-3 if len(asked) % 3 == late else 1e5, **by)

    monkeypatch.setattr(counter, "count", late_now_and_then)
    how = {"deadline_ms": 500.0, "late": "fail", "fps": 5, "format": "csv"}
    late = 1
    out = tmp_path / "rows.csv"
    assert count_inputs(counter, [film], CountOptions(out=out, **how)) == 6
    assert [row["frame"] for row in csv.DictReader(out.open())] == ["2", "4", "8", "10", "14", "16"]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {film} at 0.0 s: no exit answered within 500 ms; such frames have no row",
        f"warning: {film}: 4 of 10 frames have no row: no exit answered within 500 ms",
    ]
    monkeypatch.setattr(counter, "count", lambda *given, deadline_ms, **by: count(*given, deadline_ms=1e-3, **by))
    with pytest.raises(DeadlineMissed, match="no exit answered within 500 ms, in any of 10 frames"):
        count_inputs(counter, [film], CountOptions(out=tmp_path / "none.csv", **how))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["film.mp4", "rows.csv"]


def test_rows_of_a_truncated_video_stay(counter, tmp_path, capsys):
    path = make_video(tmp_path / "v.mkv", [i / 10 for i in range(40)], codec="mpeg4", key_every=1)
    path.write_bytes(path.read_bytes()[: int(0.6 * path.stat().st_size)])
    assert count_inputs(counter, [path], CountOptions(format="json")) == 3
    out, err = capsys.readouterr()
    assert len(json_lines(out)) == 3
    assert len(err.splitlines()) == 1
    assert str(path) in err
    (tmp_path / "no.mp4").write_bytes(b"no film at all")
    with pytest.raises(VideoError):
        count_inputs(counter, [tmp_path / "no.mp4"])


def test_rows_come_as_they_are_counted(counter, film, street, monkeypatch):
    """A long video's first row does not wait for its last."""
    seen: list[int] = []

    class Screen(io.StringIO):
        def flush(self) -> None:
            seen.append(self.getvalue().count("\n"))

    for format in ("json", "csv", "table"):
        seen.clear()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Screen())
            count_inputs(counter, [film, street], CountOptions(format=format, fps=2))
        assert len(set(seen)) >= 5, format


def test_drawings_never_take_the_place_of_an_input(counter, street, film, tmp_path):
    street.rename(tmp_path / "street.png")
    again = tmp_path / "again.mp4"
    shutil.copy(film, again)
    before = {path: path.read_bytes() for path in (tmp_path / "street.png", film, again)}
    count_inputs(counter, list(before), CountOptions(density=tmp_path, out=tmp_path / "o"))
    assert {path: path.read_bytes() for path in before} == before
    made = {"street-2.png", "film-2.mp4", "again-2.mp4"}
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in before} | made | {"o"}
    with pytest.raises(OptionError, match="would be overwritten"):
        count_inputs(counter, [film], CountOptions(audio=again, annotate=again))


def test_a_video_is_drawn_once(counter, film, tmp_path):
    with pytest.raises(OptionError, match=r"density .*d\.mp4: of a video, annotate draws it"):
        count_inputs(counter, [film], CountOptions(density=tmp_path / "d.mp4", annotate=tmp_path / "a.mp4"))
    assert [p.name for p in tmp_path.iterdir()] == [film.name]


def test_names_that_are_not_utf8(counter, street, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    odd = folder / os.fsdecode(b"caf\xe9.jpg")
    try:
        shutil.copy(street, odd)
    except OSError:
        pytest.skip("this file system has no such names")
    for inputs, line in (([odd], "caf.*jpg: no row can hold this name"), ([folder], "none of the files")):
        with pytest.raises(SourceError, match=line):
            count_inputs(counter, inputs, CountOptions(format="json"))
    shutil.copy(street, folder / "good.jpg")
    capsys.readouterr()
    assert count_inputs(counter, [folder], CountOptions(format="json")) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["source"] == str(folder / "good.jpg")
    assert err.startswith("skipped: ")
    assert len(err.splitlines()) == 1


def test_rows_of_a_stopped_run_are_not_written_over(counter, street, tmp_path):
    """Also where they are such that no run can go on with them."""
    out, part = tmp_path / "rows.json", tmp_path / "rows.json.part"
    part.write_text("{}\n")
    with pytest.raises(OptionError, match=r"an interrupted run; rename or delete its rows, .*rows\.json\.part$"):
        count_inputs(counter, [street], CountOptions(format="json", out=out))
    with pytest.raises(ResumeError, match="settings are unknown"):
        count_inputs(counter, [street], CountOptions(format="json", out=out, resume=True))
    assert part.read_text() == "{}\n"
    part.write_text("")
    assert count_inputs(counter, [street], CountOptions(format="json", out=out)) == 1


def test_one_run_at_a_time_writes_a_file(counter, street, tmp_path):
    out = tmp_path / "rows.json"
    for resume in (False, True):
        with exclusive_lock(out), pytest.raises(OutputError, match=r"rows\.json: another run is writing to it"):
            count_inputs(counter, [street], CountOptions(format="json", out=out, resume=resume))
        assert [p.name for p in tmp_path.iterdir()] == [street.name]
    assert count_inputs(counter, [street], CountOptions(format="json", out=out)) == 1


def test_nothing_that_is_written_on_the_way_overwrites_another(counter, film, tmp_path):
    unfinished = tmp_path / "film2.mp4.part"
    shutil.copy(film, unfinished)
    with pytest.raises(OptionError, match=r"annotate .*film2.mp4.part would be overwritten"):
        count_inputs(counter, [unfinished], CountOptions(annotate=tmp_path / "film2.mp4"))
    with pytest.raises(OptionError, match=r"annotate .*same.mp4.* would be overwritten"):
        count_inputs(
            counter, [film], CountOptions(format="csv", out=tmp_path / "same.mp4", annotate=tmp_path / "same.mp4")
        )
    assert unfinished.read_bytes() == film.read_bytes()


def test_a_link_is_followed_and_a_pipe_is_none(counter, street, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "real.csv")
    count_inputs(counter, [street], CountOptions(format="csv", out=tmp_path / "link.csv"))
    assert (tmp_path / "link.csv").is_symlink()
    assert (tmp_path / "real.csv").read_text().count("\n") == 2
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(OutputError, match="a device or a pipe, not a file"):
        count_inputs(counter, [street], CountOptions(format="csv", out=tmp_path / "pipe.csv"))
    with pytest.raises(OptionError, match="a run has ended in"):
        count_inputs(counter, [street], CountOptions(format="csv", out=tmp_path / "real.csv", resume=True))


@pytest.mark.parametrize(
    ("problem", "raised"), [(BrokenPipeError(32, "gone"), SystemExit), (OSError(28, "full"), OutputError)]
)
def test_a_standard_output_that_takes_no_more(problem, raised, capsys):
    with pytest.raises(raised) as ended, opened(None):
        raise problem
    assert "full" in str(ended.value) or ended.value.code == 141
