"""The command line: each command of ``crowdexit``, and what they share."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from crowdexit.cli.extensions import ExtensibleGroup
from crowdexit.cli.options import DEFAULT_MODEL, Model, RuntimeName
from crowdexit.errors import CrowdExitError, OptionError
from crowdexit.utils import command

if TYPE_CHECKING:
    from crowdexit.models.network import MultiExitNetwork
    from crowdexit.models.zoo import Spec
    from crowdexit.runtimes.base import Runtime

# Everything heavy is imported where it is used: `--help` and a mistyped option answer at once.

app = typer.Typer(
    cls=ExtensibleGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Count a crowd from image and audio, with an answer whenever the time is up.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"crowdexit {version('crowdexit')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # to tell what leaving at them is worth
Ids = Annotated[str, typer.Option(help="Only samples whose id matches this shell pattern.")]
AudioFlag = Annotated[bool, typer.Option("--audio/--no-audio", help="Use audio where there is some.")]


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


class Format(StrEnum):
    table = "table"
    json = "json"


class Library(StrEnum):
    openvino = "openvino"
    onnx = "onnx"


class Precision(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


@app.command(
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
    audio: Annotated[Path | None, typer.Option(help="Audio for the image, or in place of the video's.")] = None,
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that was stopped there.")] = False,
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
    from crowdexit.jobs.count import check_inputs, count_inputs
    from crowdexit.jobs.options import CountOptions
    from crowdexit.jobs.resume import noted_runtime
    from crowdexit.jobs.sources import expand
    from crowdexit.video.decode import DEFAULT_FPS
    from crowdexit.video.frames import parse_time

    # Mistyped options and inputs are reported before the weights are read.
    with _flags_in_errors():
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


@contextmanager
def _flags_in_errors() -> Iterator[None]:
    """Name settings by their flags in errors of the library."""
    try:
        yield
    except OptionError as error:
        raise CrowdExitError(error.with_names(lambda name: f"--{name.replace('_', '-')}")) from None


def _format_of(out: Path | None) -> CountFormat:
    endings = {".json": CountFormat.json, ".jsonl": CountFormat.json, ".csv": CountFormat.csv}
    endings |= {".parquet": CountFormat.parquet}
    return CountFormat.table if out is None else endings.get(out.suffix.lower(), CountFormat.table)


@app.command(
    epilog="Example: `crowdexit evaluate --model audiocsrnet-s --data crowd.h5 --split val --ids 'B_*' --no-audio`"
)
def evaluate(
    data: Annotated[Path, typer.Option(help="A prepared HDF5 file.")],
    model: Model = DEFAULT_MODEL,
    split: Annotated[str, typer.Option()] = "test",
    ids: Ids = "*",
    audio: AudioFlag = True,
    brightness: Annotated[float, typer.Option(min=0, help="Images darkened (or lit) by this factor.")] = 1.0,
    noise: Annotated[float, typer.Option(min=0, max=255, help="Gaussian noise of this σ, of 255.")] = 0.0,
    black: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the image under a black area.")] = 0.0,
    confidence: Annotated[
        float | None, typer.Option(min=0, max=0.9999, help="Of classes: leave at the first exit as sure as this.")
    ] = None,
    entropy: Annotated[
        float | None, typer.Option(min=1e-4, max=1, help="Or with an entropy, of the largest there is, as low as this.")
    ] = None,
    runtime: RuntimeName = "auto",
    format: Annotated[Format, typer.Option()] = Format.table,
) -> None:
    """Every exit's error on a prepared set, with or without audio, also under extreme conditions."""
    from crowdexit.data.augment import Conditions
    from crowdexit.evaluation.evaluate import evaluate_file

    if confidence is not None and entropy is not None:
        raise CrowdExitError("--confidence or --entropy, not both")
    leave: Any = None if entropy is None else ("entropy", entropy)
    if confidence is not None:
        leave = ("confidence", 1 - confidence)
    result = evaluate_file(
        model,
        data,
        split,
        ids,
        audio=audio,
        conditions=Conditions(brightness, noise, black),
        leave=leave,
        runtime=runtime,
        progress=partial(_progress, "evaluating"),
    )
    _print_evaluation({"model": model, "data": str(data), **result}, format)


def _print_evaluation(result: dict[str, Any], format: Format) -> None:
    if format is Format.json:
        print(json.dumps(result))
        return
    table = Table(title=f"{result['model']} on {result['split']} ({result['samples']} images)")
    if "audio" in result:
        table.caption = f"sound: {result['audio']}"
    columns = {"mae": "MAE", "rmse": "RMSE", "accuracy": "accuracy %"}
    columns |= {"covered": f"in the {result.get('level', 0):.0f} % interval, %", "latency_ms": "latency ms"}
    there = [key for key in columns if key in result["exits"][0]]
    table.add_column("exit")
    for key in there:
        table.add_column(columns[key], justify="right")
    for row in result["exits"]:
        table.add_row(row["exit"], *(f"{row[key]:.{1 if key in ('latency_ms', 'covered') else 2}f}" for key in there))
    if leaving := result.get("leaving"):
        left = ", ".join(f"{name} {share:.0f}" for name, share in leaving["left"].items() if share)
        table.add_section()
        table.add_row("when sure", *(f"{leaving[key]:.{1 if key == 'latency_ms' else 2}f}" for key in there))
        table.caption = f"when sure: leaving with a doubt ({leaving['measure']}) of {leaving['bound']:.4g}, %: {left}"
    Console().print(table)


@app.command(epilog="Example: `crowdexit cost --model audiocsrnet --branch slvit --format json`")
def cost(
    model: Model = "audiocsrnet",
    branch: Annotated[str | None, typer.Option(help="Only this kind of branch (cnn, slvit, mlp …).")] = None,
    layer: Annotated[str | None, typer.Option(help="Only this place (V1, AV1, AV2; of a transformer 1 to 11).")] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; default: the model's own.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Of a classifier: cifar10, cifar100, speech-commands or gtzan.")
    ] = None,
    format: Annotated[Format, typer.Option()] = Format.table,
) -> None:
    """Parameters, FLOPS and speedup of every branch, up to and including it."""
    from crowdexit.evaluation.cost import cost as run_cost

    result = run_cost(model, branch=branch, layer=layer, size=size, dataset=dataset)
    if format is Format.json:
        print(json.dumps(result.to_dict()))
        return
    table = Table(title=f"{result.model} at {result.size}: backbone {result.backbone_flops / 1e9:.2f} GFLOPS")
    for name in ("exit", "kind", "branch parameters", "FLOPS", "multiply-adds", "speedup"):
        table.add_column(name, justify="left" if name in ("exit", "kind") else "right")
    for row in result.rows():
        table.add_row(*row)
    Console().print(table)


@app.command(epilog="Example: `crowdexit tradeoff --model runs/branches --data crowd.h5 --out tradeoff`")
def tradeoff(
    data: Annotated[Path, typer.Option(help="A prepared HDF5 file.")],
    model: Model = DEFAULT_MODEL,
    split: Annotated[str, typer.Option()] = "val",
    ids: Ids = "*",
    audio: AudioFlag = True,
    budgets: Annotated[
        str | None, typer.Option(help="Budgets to recommend for, 10⁹ multiply-adds: 5,10.5. Default: quarters.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for tradeoff.csv, .md and .png.", callback=command.output_folder)
    ] = Path("tradeoff"),
    runtime: RuntimeName = "auto",
) -> None:
    """Error against cost of every exit: the practical branches, and which of them to deploy for a budget."""
    from crowdexit.evaluation import tradeoff as analysis
    from crowdexit.evaluation.evaluate import evaluate_file
    from crowdexit.models import zoo

    try:
        wanted = None if budgets is None else [1e9 * float(item) for item in budgets.split(",")]
    except ValueError:
        raise CrowdExitError(f"--budgets {budgets}: numbers with commas between") from None
    analysis.recommend([], wanted or [])
    spec = zoo.read_spec(zoo.checkpoint_path(model))
    result = evaluate_file(
        model, data, split, ids, audio=audio, runtime=runtime, progress=partial(_progress, "evaluating")
    )
    measure = "MAE" if "mae" in result["exits"][0] else "wrong answers, %"
    errors = {row["exit"]: row["mae"] if "mae" in row else 100 - row["accuracy"] for row in result["exits"]}
    made = analysis.points(spec, errors)
    audio_note = f", sound: {result['audio']}" if "audio" in result else ""
    title = f"{spec.model} on {data.name}, {split} ({result['samples']} images{audio_note})"
    paths = analysis.write(made, out, title=title, measure_name=measure, budgets=wanted)
    print(paths[1].read_text("utf-8"), end="")
    print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)


@app.command(
    "table", epilog="Example: `crowdexit table runs/end-to-end-* runs/count --data crowd.h5 --data cifar10.h5`"
)
def tables(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Folders of trained runs, or checkpoints.")],
    data: Annotated[
        list[Path], typer.Option(help="The prepared HDF5 files that the runs were trained on, once for each.")
    ],
    split: Annotated[str, typer.Option()] = "val",
    ids: Ids = "*",
    audio: AudioFlag = True,
    out: Annotated[
        Path, typer.Option(help="Folder for table.csv, .md and .png.", callback=command.output_folder)
    ] = Path("tables"),
    runtime: RuntimeName = "auto",
) -> None:
    """Table I of the multi-exit ViT paper, and its like for other places and strategies, from trained runs.

    Several runs of the same kind (other seeds) are given as mean ± standard deviation.
    """
    from crowdexit.evaluation import tables as analysis
    from crowdexit.evaluation.evaluate import evaluate_file
    from crowdexit.models import zoo

    files = {path.name: path for path in data}
    specs = {run: zoo.read_spec(zoo.checkpoint_path(run)) for run in dict.fromkeys(runs)}
    for run, spec in specs.items():
        if analysis.data_of(spec) not in files:
            raise CrowdExitError(f"{run}: trained on {analysis.data_of(spec)}; name that file with --data")
    made = []
    for run, spec in specs.items():
        path = files[analysis.data_of(spec)]
        progress = partial(_progress, f"evaluating {run}")
        result = evaluate_file(run, path, split, ids, audio=audio, runtime=runtime, progress=progress)
        measure = "MAE" if "mae" in result["exits"][0] else "accuracy"
        values = {row["exit"]: row[measure.lower()] for row in result["exits"]}
        made += analysis.figures(spec, path.stem, values, measure)
    paths = analysis.write(made, out)
    print(paths[1].read_text("utf-8"), end="")
    print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)


@app.command(epilog="Example: `crowdexit train audiocsrnet-s-density --data crowd.h5 --out runs/mine --resume`")
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a bundled recipe's name.")],
    data: Annotated[Path | None, typer.Option(help="A prepared HDF5 file, in place of the recipe's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: runs/NAME.", callback=command.output_folder)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. data.hear=0.7.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs, or processes on the CPU.")] = 1,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
) -> None:
    """Run one experiment: a recipe."""
    from crowdexit.training.recipe import read_recipe
    from crowdexit.training.run import train as run_training

    changes: dict[str, Any] = {}
    for item in set_ or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise CrowdExitError(f"--set {item}: write KEY=VALUE")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CrowdExitError(f"--set {item}: the value is not YAML") from None
    if data is not None:
        changes["data.store"] = str(data)
    folder = out or Path("runs") / Path(recipe).stem
    path = run_training(
        read_recipe(recipe, changes),
        folder,
        resume=resume,
        devices=devices,
        accelerator=accelerator,
        console=Console(stderr=True),
    )
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(path)


@app.command(epilog="Example: `crowdexit suite table-iv --data cifar10.h5 --out runs/table-iv --jobs 2`")
def suite(
    name: Annotated[str, typer.Argument(metavar="SUITE", help="A suite's file, or a bundled suite's name.")],
    data: Annotated[Path, typer.Option(help="A prepared HDF5 file.")],
    out: Annotated[Path, typer.Option(help="Folder of the runs and of the table.", callback=command.output_folder)],
    seeds: Annotated[int, typer.Option(min=1, help="How often the branches are trained.")] = 5,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings at once; they share the cores.")] = 1,
    pictures: Annotated[
        Path | None, typer.Option(help="Unlabelled images, a folder or prepared: copycat on top.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data, for the table.")] = "test",
    runtime: RuntimeName = "auto",
) -> None:
    """Run all experiments of a table of the SL-ViT paper, and write it in the paper's layout.

    What has ended is not run again; what was killed goes on where it was; what fails stops nothing else.
    """
    from crowdexit.evaluation import scenarios
    from crowdexit.evaluation.cost import cost_of
    from crowdexit.evaluation.evaluate import evaluate_file
    from crowdexit.evaluation.files import write_files
    from crowdexit.models import zoo
    from crowdexit.training.suite import Run, described, read_suite, run_all, runs_of

    wanted = read_suite(name)
    if not data.is_file():  # said once, not by every run
        raise CrowdExitError(f"{data}: no such prepared file")
    runs = runs_of(wanted, data, out, seeds, pictures)
    for first in (run for run in runs if run.step == "branches" and run.seed == 0):
        # The costs in the table are known to work out before days of training. A wrong recipe fails its own runs alone.
        with suppress(CrowdExitError):
            cost_of(described(first, runs), first.name)
    with _progress("training", len(runs)) as advance:

        def report(run: Run, problem: str | None) -> None:
            advance()
            if problem is not None:
                print(f"{run.name}: {problem}", file=sys.stderr)

        failed = run_all(runs, out, jobs, report)
    outcomes = []
    for run in runs:
        if run.step == "backbone" or run.name in failed:
            continue
        path, metrics_path = out / run.name / "model.safetensors", out / run.name / f"{split}.json"
        if not metrics_path.exists():
            try:
                result = evaluate_file(path, data, split, runtime=runtime, progress=partial(_progress, run.name))
            except CrowdExitError as error:  # the others keep their table
                failed[run.name] = str(error)
                print(f"{run.name}: {error}", file=sys.stderr)
                continue
            write_files(out / run.name, {metrics_path.name: json.dumps(result)})
        exits = json.loads(metrics_path.read_text("utf-8"))["exits"]
        key = "mae" if "mae" in exits[0] else "accuracy"
        values = {row["exit"]: row[key] for row in exits}
        measure = "MAE" if key == "mae" else "accuracy"
        outcomes.append(scenarios.Outcome(run.backbone, zoo.read_spec(path), run.step == "copycat", measure, values))
    paths = scenarios.write(outcomes, out, title=wanted.title, paper=wanted.paper)
    print(paths[1].read_text("utf-8"), end="")
    print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)
    if failed:
        raise CrowdExitError(f"{len(failed)} of {len(runs)} runs failed ({', '.join(failed)}); see their log.txt")


@app.command(epilog="Example: `crowdexit search runs/branches --data cifar10.h5 --place 1 --heads 2,4,8,12,16`")
def search(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose branches were trained classifier-wise.")],
    data: Annotated[Path, typer.Option(help="The prepared HDF5 file that it was trained on.")],
    place: Annotated[str, typer.Option(help="Where the branches stand.")],
    dims: Annotated[str, typer.Option(help="Widths d to try, with commas between.")] = "32",
    heads: Annotated[str, typer.Option(help="Numbers of heads h to try, with commas between.")] = "2,4,8,12,16,24",
    out: Annotated[
        Path, typer.Option(help="Folder of the run and of grid.csv, .md and .png.", callback=command.output_folder)
    ] = Path("search"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the search that is there.")] = False,
) -> None:
    """Try every d and h of an SL-ViT branch side by side: the best with no more parameters than the CNN branch."""
    from crowdexit.evaluation import grid
    from crowdexit.training.run import train as run_training
    from crowdexit.training.search import search_recipe

    recipe = search_recipe(run, data, place, _numbers("--dims", dims), _numbers("--heads", heads))
    path = run_training(recipe, out, resume=resume, console=Console(stderr=True))
    paths = grid.write(grid.read_grid(path), out)
    print(paths[1].read_text("utf-8"), end="")
    print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError:
        raise CrowdExitError(f"{option} {text}: whole numbers with commas between") from None


@app.command(epilog="Example: `crowdexit visualize street.jpg --model audiocsrnet-s --exits V1,V1-cnn`")
def visualize(
    image: Annotated[Path, typer.Argument(help="An image.")],
    model: Model = DEFAULT_MODEL,
    exits: Annotated[str | None, typer.Option(help="Names with commas between; default: all early exits.")] = None,
    out: Annotated[Path, typer.Option(help="The PNG to write.", callback=command.output_file)] = Path("visualized.png"),
) -> None:
    """Draw the effective receptive field of each branch, and the attention of an SL-ViT branch."""
    from crowdexit.data.image import read_pixels
    from crowdexit.evaluation import receptive
    from crowdexit.models import zoo

    shown = read_pixels(image)
    network, _ = zoo.load(model)
    sights = receptive.receptive_fields(network, shown, None if exits is None else exits.split(","))
    receptive.write(network, shown, sights, out)
    table = Table(title=f"{model}: the share of the image that holds nine tenths of the field")
    for name in ("exit", "kind", "field"):
        table.add_column(name, justify="left" if name != "field" else "right")
    for sight in sights:
        table.add_row(sight.exit, sight.kind, f"{sight.wide:.1%}")
    Console().print(table)
    print(f"Written: {out}", file=sys.stderr)


@app.command(epilog="Example: `crowdexit copycat runs/branches --pictures holiday/ --data cifar10.h5 --out runs/cc`")
def copycat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose branches were trained classifier-wise.")],
    data: Annotated[Path, typer.Option(help="The prepared HDF5 file that it was trained on.")],
    pictures: Annotated[
        Path, typer.Option(help="Folder of unlabelled images (for a set of sounds: recordings), or a prepared file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new run.", callback=command.output_folder)],
    split: Annotated[str, typer.Option(help="Of a prepared file with --pictures.")] = "train",
    ratio: Annotated[float, typer.Option(help="Unlabelled samples for each labelled one.")] = 2.0,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint whose final exit labels them; default: the run's own backbone.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the run's own.")] = None,
    lr: Annotated[float | None, typer.Option(help="Default: a tenth of the run's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
) -> None:
    """Fine-tune trained branches on unlabelled images or audio, labelled by the backbone or another teacher."""
    from crowdexit.training.copycat import copycat_recipe
    from crowdexit.training.run import train as run_training

    recipe = copycat_recipe(run, data, pictures, split=split, ratio=ratio, teacher=teacher, epochs=epochs, lr=lr)
    print(run_training(recipe, out, resume=resume, console=Console(stderr=True)))


@app.command(
    epilog="Example: `crowdexit compress runs/audiocsrnet-s-branches checkpoints/audiocsrnet-s/model.safetensors`"
)
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained run's folder or checkpoint.")],
    out: Annotated[Path, typer.Argument(help="The smaller checkpoint.", callback=command.output_file)],
    exits: Annotated[str | None, typer.Option(help="Early exits to keep, with commas between; default: all.")] = None,
) -> None:
    """Convert a checkpoint to float16, half the size, optionally keeping only some exits."""
    from crowdexit.models import zoo

    network, spec = zoo.load(model)
    if exits is not None:
        network, spec = zoo.with_exits(network, spec, exits.split(","))
    zoo.save(network, spec, out, half=True)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@app.command(epilog="Example: `crowdexit export --precision int8 --calibrate crowd.h5 --out audiocsrnet-s-int8`")
def export(
    out: Annotated[Path, typer.Option(help="The folder to write.", callback=command.output_folder)],
    model: Annotated[
        str, typer.Option("--model", help="A shipped model's name, or a checkpoint's path.")
    ] = DEFAULT_MODEL,
    format: Annotated[Library, typer.Option(help="What is to run it.")] = Library.openvino,
    precision: Annotated[Precision, typer.Option(help="bf16 and int8: of OpenVINO alone.")] = Precision.fp32,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; default: the model's own.")] = None,
    exits: Annotated[
        str | None, typer.Option(help="Early exits to take along, with commas between; final: none. Default: all.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="A prepared HDF5 file to measure int8's ranges on; default: the model's own.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of that file; default: train.")] = None,
) -> None:
    """Write every stage and every exit as a model that runs without PyTorch, and a manifest that says how."""
    from crowdexit.export.manifest import read_manifest
    from crowdexit.export.writer import export as run_export

    path = run_export(
        model,
        out,
        library=format.value,
        precision=precision.value,
        size=size,
        exits=None if exits is None else exits.split(","),
        calibrate=calibrate,
        split=split,
    )
    files = [file for file in path.rglob("*") if file.is_file()]
    print(f"{path}: {len(files)} files, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB")
    manifest = read_manifest(path)
    if manifest.classifies or (manifest.intervals is not None and precision is Precision.fp32):
        return
    there = "its intervals are the checkpoint's"
    if manifest.intervals is None:
        there = f"there are no intervals for it at {size or 'its size'}"
    print(f"note: {there}; `crowdexit calibrate {path} --data …` measures its own", file=sys.stderr)


@app.command("cross-fit", epilog="Example: `crowdexit cross-fit runs/fold-* --data crowd.h5 --out counts.csv`")
def cross_fit(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs that left a fold out, one for each.")],
    data: Annotated[Path, typer.Option(help="The prepared HDF5 file that they were trained on.")],
    out: Annotated[Path, typer.Option(help="The table to write.", callback=command.output_file)] = Path("counts.csv"),
    runtime: RuntimeName = "auto",
) -> None:
    """Count training images with networks that were trained without them, for `crowdexit calibrate --held-out`."""
    from crowdexit.evaluation.cross_fit import cross_fit as run_cross_fit

    images = run_cross_fit(runs, data, out, runtime=runtime, progress=partial(_progress, "counting"))
    print(f"{out}: {images} images")


@app.command(epilog="Example: `crowdexit calibrate runs/audiocsrnet-s-branches --data crowd.h5 --split val`")
def calibrate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A trained run's folder, a checkpoint, or an exported folder.")
    ],
    data: Annotated[Path, typer.Option(help="A prepared HDF5 file with held-out images.")],
    split: Annotated[str, typer.Option()] = "val",
    ids: Ids = "*",
    level: Annotated[float, typer.Option(help="Of counts: how often the interval is to hold the truth.")] = 0.9,
    held_out: Annotated[
        Path | None,
        typer.Option(help="What `crowdexit cross-fit` wrote: how errors of small and large counts compare."),
    ] = None,
    runtime: RuntimeName = "auto",
) -> None:
    """Write into a checkpoint or an export how sure its exits are, measured on held-out images.

    Of counts the intervals: how far each exit was from the truth; and, where the file has training images, statistics
    of these, by which a count tells whether its image is familiar. Of classes the temperatures, and what comes of
    leaving when sure.
    """
    from crowdexit.inference.models import open_model
    from crowdexit.utils.memory import keep_freed_memory

    keep_freed_memory()
    network, spec, selected = open_model(model, runtime)
    if network.classifies:
        _calibrate_classes(model, network, spec, data, split, ids, selected)
    else:
        _calibrate_counts(model, network, spec, data, split, ids, level, held_out, selected)


def _calibrate_counts(
    model: str,
    network: MultiExitNetwork,
    spec: Spec,
    data: Path,
    split: str,
    ids: str,
    level: float,
    held_out: Path | None,
    runtime: Runtime,
) -> None:
    from crowdexit.data.store import Store
    from crowdexit.evaluation.cross_fit import read_counts
    from crowdexit.evaluation.evaluate import calibrate as run_calibration
    from crowdexit.evaluation.evaluate import measure_familiarity
    from crowdexit.inference.counter import CrowdCounter
    from crowdexit.inference.models import keep_calibration

    cross_fitted = None if held_out is None else read_counts(held_out)
    with Store(data) as store:
        wanted = store.ids(split, ids)
        trained_on = store.ids("train") if "train" in store.splits() else []
        counter = CrowdCounter(network, spec.model, runtime=runtime, exits=network.exit_names)
        with _progress("calibrating", 2 * len(wanted)) as advance:
            intervals = run_calibration(
                counter, store, split, wanted, level, cross_fitted=cross_fitted, progress=advance
            )
        familiarity = None
        if trained_on:
            with _progress("describing training images", len(trained_on)) as advance:
                familiarity = measure_familiarity(counter, store, "train", trained_on, progress=advance)
    path = keep_calibration(model, intervals=intervals, familiarity=familiarity)
    table = Table(title=f"{path}: {level:.0%} of {len(wanted)} images within ± w · (count + 10)")
    for name in ("exit", "w without audio", "for small, middle, large counts", "w with audio", "small, middle, large"):
        table.add_column(name, justify="left" if name == "exit" else "right")
    for name in counter.exits:
        cells = []
        for widths, by_size in (
            (intervals.without_audio, intervals.without_audio_thirds),
            (intervals.with_audio, intervals.with_audio_thirds),
        ):
            thirds = by_size.get(name)
            cells.append(f"{widths[name]:.3f}" if name in widths else "")
            cells.append("" if thirds is None else " ".join(f"{w:.3f}" for w in thirds.widths))
        table.add_row(name, *cells)
    Console().print(table)
    if familiarity is not None:
        print(
            f"familiar: a distance of {familiarity.threshold:.0f} at most, from {familiarity.samples} training images"
        )


def _calibrate_classes(
    model: str, network: MultiExitNetwork, spec: Spec, data: Path, split: str, ids: str, runtime: Runtime
) -> None:
    from crowdexit.calibration.temperatures import surprise
    from crowdexit.data.classes import ClassStore
    from crowdexit.evaluation import classify
    from crowdexit.evaluation.leaving import costs_on_the_way, leaving
    from crowdexit.inference.counter import served_exits
    from crowdexit.inference.models import keep_calibration

    with ClassStore(data) as store:
        wanted = classify.matching(store, split, ids)
        with _progress("calibrating", len(wanted)) as advance:
            chain = runtime.ready(network)
            scores, labels = classify.scores_of(chain, store, split, wanted, progress=advance)
    temperatures = classify.calibrate(scores, labels)
    path = keep_calibration(model, temperatures=temperatures)
    table = Table(title=f"{path}: temperatures from {len(wanted)} images")
    for name in ("exit", "temperature", "surprise before, nats", "after"):
        table.add_column(name, justify="left" if name == "exit" else "right")
    for name, t in temperatures.by_exit.items():
        before, after = (surprise(scores[name], labels, by) for by in (1.0, t))
        table.add_row(name, f"{t:.3f}", f"{before:.3f}", f"{after:.3f}")
    Console().print(table)
    exits = served_exits(network)
    bounds = [1 - confidence for confidence in CONFIDENCES]
    made = leaving(
        {name: temperatures.uncertainties(name, scores[name], "confidence") for name in exits},
        {name: (scores[name].argmax(1) != labels).astype(float) for name in exits},
        costs_on_the_way(spec, exits),
        bounds,
    )
    table = Table(title="leaving at the first exit as sure as …")
    for name in ("confidence", "accuracy %", "multiply-adds, 10⁹", *(f"{name} %" for name in exits)):
        table.add_column(name, justify="right")
    for point in made:
        shares = (f"{100 * point.shares[name]:.0f}" for name in exits)
        table.add_row(f"{1 - point.bound:.2f}", f"{100 * (1 - point.error):.2f}", f"{point.cost / 1e9:.3g}", *shares)
    Console().print(table)


@app.command(epilog="Example: `crowdexit calibrate-int8 runs/audiocsrnet-lite --data crowd.h5`")
def calibrate_int8(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A trained run's folder, or a checkpoint.")],
    data: Annotated[Path, typer.Option(help="A prepared HDF5 file with training images.")],
    split: Annotated[str, typer.Option()] = "train",
) -> None:
    """Measure the ranges of a checkpoint's activations and write them into it, so that it can run in int8."""
    from crowdexit.inference.models import open_model
    from crowdexit.models import zoo
    from crowdexit.runtimes.calibration import MOST, of_file
    from crowdexit.runtimes.int8 import measure_ranges

    path = zoo.checkpoint_path(model)
    network, _, _ = open_model(path, "eager")
    with _progress("measuring", MOST) as advance:
        ranges = measure_ranges(network, [*of_file(data, split, network)], advance)
    zoo.write_ranges(path, ranges)
    print(f"{path}: the ranges of {len(ranges)} layers")


@app.command(epilog="Example: `crowdexit demo`")
def demo(
    model: Model = DEFAULT_MODEL,
    out: Annotated[Path, typer.Option(help="Folder for the annotated clip.", callback=command.output_folder)] = Path(
        "demo-out"
    ),
    runtime: RuntimeName = "auto",
) -> None:
    """Count the bundled clip, whose true count is known, and write it annotated."""
    from crowdexit.inference.counter import load
    from crowdexit.jobs.demo import run_demo

    run_demo(load(model, runtime=runtime), out, Console())


class _progress:
    """A bar with the time left on stderr, only where somebody looks."""

    def __init__(self, what: str, total: int) -> None:
        self.bar = Progress(
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self.task = self.bar.add_task(what, total=total)

    def __enter__(self) -> Any:
        self.bar.start()
        return lambda: self.bar.advance(self.task)

    def __exit__(self, *_: object) -> None:
        self.bar.stop()


def main() -> None:
    """The entry point of the ``crowdexit`` command."""
    sys.exit(command.run(app))


if __name__ == "__main__":
    main()
