"""Count the bundled clip with every exit and compare with its true counts."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from crowdexit.errors import CrowdExitError
from crowdexit.inference.counter import CrowdCounter
from crowdexit.jobs.output import opened
from crowdexit.reports.draw import banner, overlay
from crowdexit.results import ExitResult
from crowdexit.utils.paths import PACKAGE
from crowdexit.utils.progress import progress_bar
from crowdexit.video.annotate import AnnotatedVideo
from crowdexit.video.decode import Span
from crowdexit.video.frames import expected_rows, read_frames

SAMPLES = PACKAGE / "samples"
FPS = 2.0  # of the clip's ten: the twenty frames whose heads are annotated
POOR = 0.25  # of the true count: a larger mean error is pointed out


class DemoError(CrowdExitError):
    """The demo's files are missing, or its results cannot be written."""


def run_demo(counter: CrowdCounter, out: Path, console: Console) -> None:
    """Count the bundled clip with every exit, print the errors, and write the annotated clip.

    Args:
        out: the folder for ``clip-counted.mp4`` and ``clip-counted.csv``; made if need be.

    Raises:
        CrowdExitError: if the samples are not installed or the folder cannot be written to.
    """
    clip, truth = SAMPLES / "clip.mp4", true_counts(SAMPLES / "clip.csv")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"{out}: the folder cannot be made ({error.strerror})") from None
    video, table = out / "clip-counted.mp4", out / "clip-counted.csv"
    console.print(f"Counting the bundled clip with {counter.model} ({counter.chain.runtime}), {FPS:g} frames a second.")
    console.print(
        "Images: a surveillance video of people walking, whose heads were annotated by hand in these frames.\n"
        "Audio: [bold]simulated[/bold] from the annotated counts, not recorded on site.\n",
        soft_wrap=True,
    )
    counts: list[int] = []
    answers: list[list[ExitResult]] = []
    with (
        opened(table) as file,
        AnnotatedVideo(video, clip, 1 / FPS) as drawn,
        progress_bar("counting", expected_rows(clip, Span(FPS)), console=console) as advance,
    ):
        rows = csv.writer(file, lineterminator="\n")
        names = [f"{name}_{what}" for name in counter.exits for what in ("count", "latency_ms")]
        rows.writerow(["frame", "time_s", "true_count", *names])
        for frame in read_frames(clip, Span(FPS)):
            image = frame.image
            if not answers:  # warm up, so that latencies exclude it
                list(counter.stream(image, frame.waveform))
            results = list(counter.stream(image, frame.waveform))
            counts.append(truth[frame.index])
            answers.append(results)
            numbers = [f"{x:.2f}" for r in results for x in (r.count, r.latency_ms)]
            rows.writerow([frame.index, f"{frame.time_s:.3f}", counts[-1], *numbers])
            last = results[-1]
            image = image if last.density is None else overlay(image, last.density)
            drawn.add(banner(image, f"counted {last.count:.0f}, true {counts[-1]} (simulated audio)"), frame)
            advance()
    console.print(_summary(counts, answers))
    console.print(
        f"Truth: {np.mean(counts):.1f} people a frame ({min(counts)} to {max(counts)}, {len(counts)} frames)."
    )
    share = _error(counts, [results[-1] for results in answers]) / np.mean(counts)
    if share > POOR:
        console.print(
            f"[yellow]{answers[0][-1].exit} is off by {share:.0%} of the truth here: this network counts a street with "
            "few people poorly. Its model card says what it was trained on.[/yellow]",
            soft_wrap=True,
        )
    console.print(f"The annotated clip is {video}, the counts are in {table}.", soft_wrap=True)


def true_counts(path: Path) -> dict[int, int]:
    """The true count by frame.

    Raises:
        DemoError: if the table is not there or not a table of counts.
    """
    try:
        with path.open(newline="") as file:
            return {int(row["frame"]): int(row["count"]) for row in csv.DictReader(file)}
    except (OSError, KeyError, ValueError):
        raise DemoError(f"{path}: the sample's true counts are missing or damaged") from None


def _summary(truth: list[int], answers: list[list[ExitResult]]) -> Table:
    """Each exit's mean count, error and latency."""
    table = Table()
    for name in ("exit", "mean count", "mean abs. error", "latency ms"):
        table.add_column(name, justify="left" if name == "exit" else "right")
    for results in zip(*answers, strict=True):
        mean, latency = np.mean([r.count for r in results]), np.mean([r.latency_ms for r in results])
        table.add_row(results[0].exit, f"{mean:.1f}", f"{_error(truth, results):.1f}", f"{latency:.0f}")
    return table


def _error(truth: list[int], results: Sequence[ExitResult]) -> float:
    """One exit's mean absolute error."""
    return float(np.abs(np.array([r.count for r in results]) - truth).mean())
