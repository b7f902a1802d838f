"""Write counts as rows: a table, JSON lines, CSV or Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, get_args

from rich.console import Console
from rich.table import Table

from crowdexit.data.mel import AudioStatus
from crowdexit.jobs.output import OutputError
from crowdexit.jobs.smooth import Smoother
from crowdexit.results import CountResult
from crowdexit.utils.files import atomic_write
from crowdexit.video.frames import Frame

Format = Literal["table", "json", "csv", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)
COLUMNS = (
    *("source", "frame", "time_s", "count", "low", "high", "smoothed", "chosen_exit", "latency_ms"),
    *("audio", "familiar", "warnings"),
)
UNFAMILIAR = "This image is unlike those the network was trained on: the count may be far off."
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # characters that start a formula in spreadsheets
_ROW_GROUP = 50_000  # rows of a Parquet file in memory


@dataclass(frozen=True)
class FrameRow:
    """A counted frame and its smoothed count: a line of JSON, a row of the other formats.

    ``interval`` is that of the count, not of the smoothed one; None if the checkpoint is not calibrated. ``audio``:
    whether it was used, or why not. ``familiar``: whether the image resembles the training images, None if unknown
    (:class:`crowdexit.inference.counter.ExitResult`). ``warnings``: of the input's reader, one line each.
    """

    source: str
    frame: int
    time_s: float
    count: float
    interval: tuple[float, float] | None
    smoothed: float
    chosen_exit: str
    latency_ms: float
    audio: AudioStatus = "none"
    familiar: bool | None = None
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: str, frame: Frame, result: CountResult, smoother: Smoother) -> FrameRow:
        """The row of a frame. Times are rounded to a millisecond, counts and latencies to a hundredth.

        The rounded count is smoothed, so that the smoothed count can be recomputed from the rows.
        """
        time, count, chosen = round(frame.time_s, 3), round(result.count, 2), result.chosen
        smoothed = round(smoother.add(time, count), 2)
        interval = None if chosen.interval is None else (round(chosen.interval[0], 2), round(chosen.interval[1], 2))
        latency = round(chosen.latency_ms, 2)
        extras = (result.audio, result.familiar, result.warnings)
        return cls(source, frame.index, time, count, interval, smoothed, chosen.exit, latency, *extras)


class Rows(Protocol):
    """Writes each counted image or frame immediately."""

    def image(self, source: str, result: CountResult) -> None: ...

    def frame(self, row: FrameRow) -> None: ...


def checked_format(format: str) -> Format:
    """The name itself.

    Raises:
        OutputError: if it is none of :data:`FORMATS`.
    """
    for known in FORMATS:
        if format == known:
            return known
    raise OutputError(f"no format {format!r} (there are {', '.join(FORMATS)})")


def writer(format: Format, file: TextIO, sources: Sequence[str], *, single: bool, begun: bool = False) -> Rows:
    """A writer of that format.

    A Parquet file cannot be read before its end is written: it is made of JSON lines by :func:`write_parquet`.

    Args:
        sources: all names (they set the width of a table).
        single: a single image; a table then shows every exit.
        begun: rows exist already.
    """
    if format in ("json", "parquet"):
        return JSONRows(file)
    if format == "csv":
        return CSVRows(file, begun=begun)
    return ExitTable(file) if single else TableRows(file, max(map(len, sources), default=0))


def write_parquet(lines: Path, out: Path) -> None:
    """Convert JSON lines to a Parquet file, in groups of rows, and remove them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {
        "frame": pa.int64(),
        "familiar": pa.bool_(),
        **dict.fromkeys(("source", "chosen_exit", "audio", "warnings"), pa.string()),
    }
    schema = pa.schema([(name, kinds.get(name, pa.float64())) for name in COLUMNS])
    with (
        atomic_write(out, suffix=".new") as new,
        lines.open(encoding="utf-8") as file,
        pq.ParquetWriter(new, schema) as writer,
    ):
        while group := [_columns(json.loads(line)) for line in islice(file, _ROW_GROUP)]:
            columns = [pa.array([row[f.name] for row in group], f.type) for f in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
    lines.unlink()


def _columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of JSON as a row of columns.

    An image's has no frame, time or smoothed count; of its exits only the chosen one is kept. Several warnings
    become one text.
    """
    exits = {e["exit"]: e["interval"] for e in row.get("exits", ())}
    low, high = (exits[row["chosen_exit"]] if exits else row["interval"]) or (None, None)
    cells = {**row, "low": low, "high": high, "warnings": "; ".join(row["warnings"])}
    return {name: cells.get(name) for name in COLUMNS}


class JSONRows:
    """One JSON object a line."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def image(self, source: str, result: CountResult) -> None:
        self._write(result.to_dict(source))

    def frame(self, row: FrameRow) -> None:
        self._write(asdict(row))

    def _write(self, row: dict[str, object]) -> None:
        print(json.dumps(row, ensure_ascii=False), file=self.file, flush=True)


def csv_text(text: str) -> str:
    """Escape text for CSV: prefix an apostrophe if a spreadsheet would run it as a formula.

    Examples:
        >>> csv_text("=1+1.jpg")
        "'=1+1.jpg"
    """
    return f"'{text}" if text.startswith(_FORMULA) else text


class CSVRows:
    """One line an image or frame under the names of the columns; names as of :func:`csv_text`."""

    def __init__(self, file: TextIO, *, begun: bool = False) -> None:
        self.file = file
        self.csv = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        self._begun = begun

    def image(self, source: str, result: CountResult) -> None:
        self._write(result.to_dict(source))

    def frame(self, row: FrameRow) -> None:
        self._write(asdict(row))

    def _write(self, row: Mapping[str, Any]) -> None:
        if not self._begun:
            self.csv.writeheader()
            self._begun = True
        cells = _columns(row)
        familiar = {True: "true", False: "false"}.get(cells["familiar"])
        texts = {name: csv_text(cells[name]) for name in ("source", "warnings")}
        self.csv.writerow({**cells, **texts, "familiar": familiar})
        self.file.flush()


class TableRows:
    """Aligned lines, written one by one, so that rows of a long video appear as they are counted."""

    def __init__(self, file: TextIO, width: int) -> None:
        self.file, self.width = file, max(6, width)
        self._begun = False

    def image(self, source: str, result: CountResult) -> None:
        chosen = result.chosen
        ends = (chosen.exit, chosen.latency_ms, chosen.familiar)
        self._write(source, "", "", result.count, chosen.interval, "", *ends)

    def frame(self, row: FrameRow) -> None:
        time, smoothed = f"{row.time_s:.2f}", f"{row.smoothed:.1f}"
        ends = (row.chosen_exit, row.latency_ms, row.familiar)
        self._write(row.source, str(row.frame), time, row.count, row.interval, smoothed, *ends)

    def _write(
        self,
        source: str,
        frame: str,
        time: str,
        count: float,
        interval: tuple[float, float] | None,
        smoothed: str,
        exit: str,
        latency: float,
        familiar: bool | None,
    ) -> None:
        if not self._begun:
            self._line("source", "frame", "time s", "count", "interval", "smoothed", "exit", "ms", "")
            self._begun = True
        note = "unfamiliar" if familiar is False else ""
        self._line(source, frame, time, f"{count:.1f}", _from_to(interval), smoothed, exit, f"{latency:.0f}", note)

    def _line(self, source: str, *cells: str) -> None:
        frame, time, count, interval, smoothed, exit, latency, note = cells
        line = f"{source:<{self.width}}  {frame:>7}  {time:>9}  {count:>9}  {interval:>14}  {smoothed:>9}"
        print(f"{line}  {exit:<8}  {latency:>7}  {note}".rstrip(), file=self.file, flush=True)


def _from_to(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{interval[0]:.0f} to {interval[1]:.0f}"


class ExitTable:
    """The results of all exits for one image, with the chosen one marked."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def image(self, source: str, result: CountResult) -> None:
        with_interval = any(e.interval for e in result.exits)
        table = Table()
        table.add_column("exit")
        table.add_column("count", justify="right")
        if with_interval:
            table.add_column("interval", justify="right")
        table.add_column("ms", justify="right")
        table.add_column("")
        for e in result.exits:
            chosen = e is result.chosen
            cells = [e.exit, f"{e.count:.1f}"]
            if with_interval:
                cells.append(_from_to(e.interval))
            cells += [
                f"{e.latency_ms:.0f}",
                ("◀ chosen, late" if result.in_time is False else "◀ chosen") if chosen else "",
            ]
            table.add_row(*cells, style="bold" if chosen else None)
        print(f"{source}: {result.count:.1f} people", file=self.file)
        Console(file=self.file).print(table)
        if result.familiar is False:
            print(UNFAMILIAR, file=self.file)

    def frame(self, row: FrameRow) -> None:
        raise AssertionError("a single image has no frames")
