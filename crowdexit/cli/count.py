"""``crowdexit count``."""

from __future__ import annotations

import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from crowdexit.cli.errors import flags_in_errors
from crowdexit.cli.options import DEFAULT_MODEL, Model, RuntimeName
from crowdexit.utils import command

# Everything heavy is imported where it is used: `--help` and a mistyped option answer at once.

commands = typer.Typer()


class CountFormat(StrEnum):
    table = "table"
    json = "json"
    csv = "csv"
    parquet = "parquet"


class Late(StrEnum):
    wait = "wait"
    fail = "fail"


class PolicyName(StrEnum):
    anytime = "anytime"
    fits = "fits"
    confident = "confident"


@commands.command(
    epilog="Examples: `crowdexit count street.jpg clip.mp4 --format json --out counts.jsonl`, "
    "`crowdexit count street.jpg --deadline-ms 100`, `crowdexit count photos --policy confident --within 50%`, "
    "`crowdexit count photos --budget-ms 10000`"
)
def count(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT…",
            help="Images, folders, videos, mixed. Or live: camera:0, rtsp://…, http://…, a named pipe, - (piped in).",
        ),
    ],
    audio: Annotated[Path | None, typer.Option(help="Audio for the image, or to replace the video's own.")] = None,
    model: Model = DEFAULT_MODEL,
    exit: Annotated[str, typer.Option("--exit", help="The exit to stop at, or auto: the last in time.")] = "auto",
    deadline_ms: Annotated[
        float | None, typer.Option(help="Answer each image or frame with the latest exit by then.")
    ] = None,
    late: Annotated[
        Late, typer.Option(help="Where no exit has answered by then: wait for the first, or fail.")
    ] = Late.wait,
    policy: Annotated[
        PolicyName,
        typer.Option(
            help="anytime: every exit in time. fits: one exit only, the deepest that is in time here. confident: stop "
            "at the first whose interval is narrow enough."
        ),
    ] = PolicyName.anytime,
    within: Annotated[
        str | None, typer.Option(help="Narrow enough: ± so many people (15), or a share of the count. [default: 50%]")
    ] = None,
    budget_ms: Annotated[
        float | None, typer.Option(help="For all images together: the exits with the least error in this time.")
    ] = None,
    runtime: RuntimeName = "auto",
    fps: Annotated[float | None, typer.Option(help="Counted frames a second of video; default: one.")] = None,
    start: Annotated[str, typer.Option(help="Count a video from here: seconds, mm:ss or hh:mm:ss.")] = "0",
    end: Annotated[str | None, typer.Option(help="Count a video until here, a live source for so long.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Frames of a video at once; default: 4, live or with a deadline 1.")
    ] = None,
    smooth: Annotated[float, typer.Option(help="Half-life of a video's smoothed count, in seconds.")] = 2.0,
    format: Annotated[CountFormat | None, typer.Option(help="Default: as --out ends, else a table.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write here instead of the screen.", callback=command.output_file)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted run.")] = False,
    density: Annotated[
        Path | None, typer.Option(help="Density over the image: PNG, .npy, .mp4 for a video, or a folder.")
    ] = None,
    annotate: Annotated[
        Path | None, typer.Option(help="A video's counted frames with density and count: .mp4, or a folder.")
    ] = None,
) -> None:
    """Count people in images, folders, videos and live sources."""
    from crowdexit.inference.counter import load
    from crowdexit.inference.policies import policy_named
    from crowdexit.jobs.checks import check_inputs
    from crowdexit.jobs.count import count_inputs
    from crowdexit.jobs.options import CountOptions
    from crowdexit.jobs.resume import noted_runtime
    from crowdexit.jobs.sources import expand
    from crowdexit.video.decode import DEFAULT_FPS
    from crowdexit.video.frames import parse_time

    # Mistyped options and inputs are reported before the weights are read.
    with flags_in_errors():
        options = CountOptions(
            audio=audio,
            exit=exit,
            deadline_ms=deadline_ms,
            late=late.value,
            policy=policy_named(policy, within),
            budget_ms=budget_ms,
            fps=DEFAULT_FPS if fps is None else fps,
            start=parse_time(start),
            end=math.inf if end is None else parse_time(end),
            batch=batch,
            smooth=smooth,
            format=(format or _format_of(out)).value,
            out=out,
            resume=resume,
            density=density,
            annotate=annotate,
        )
        check_inputs(expand(inputs), options)
        if resume and out is not None and runtime == "auto":
            runtime = noted_runtime(out) or runtime
        count_inputs(load(model, runtime=runtime, warm=False), inputs, options, progress=sys.stderr.isatty())


def _format_of(out: Path | None) -> CountFormat:
    endings = {".json": CountFormat.json, ".jsonl": CountFormat.json, ".csv": CountFormat.csv}
    endings |= {".parquet": CountFormat.parquet}
    return CountFormat.table if out is None else endings.get(out.suffix.lower(), CountFormat.table)
