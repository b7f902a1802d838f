"""Evaluate trained networks: errors, costs, tables, receptive fields."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from crowdexit.cli.options import DEFAULT_MODEL, AudioFlag, Format, Ids, Model, RuntimeName
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command
from crowdexit.utils.progress import progress_bar

# Everything heavy is imported where it is used: `--help` and a mistyped option answer at once.

commands = typer.Typer()


@commands.command(
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
        float | None, typer.Option(min=0, max=0.9999, help="Classification: exit early at this confidence.")
    ] = None,
    entropy: Annotated[
        float | None, typer.Option(min=1e-4, max=1, help="Classification: exit early at this normalised entropy.")
    ] = None,
    runtime: RuntimeName = "auto",
    format: Annotated[Format, typer.Option()] = Format.table,
) -> None:
    """Measure every exit's error on a prepared set, with or without audio, also under extreme conditions."""
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
        progress=partial(progress_bar, "evaluating"),
    )
    _print_evaluation({"model": model, "data": str(data), **result}, format)


def _print_evaluation(result: dict[str, Any], format: Format) -> None:
    if format is Format.json:
        print(json.dumps(result))
        return
    table = Table(title=f"{result['model']} on {result['split']} ({result['samples']} images)")
    if "audio" in result:
        table.caption = f"audio: {result['audio']}"
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
        table.caption = (
            f"early exit at an uncertainty ({leaving['measure']}) of at most {leaving['bound']:.4g}, %: {left}"
        )
    Console().print(table)


@commands.command(epilog="Example: `crowdexit cost --model audiocsrnet --branch slvit --format json`")
def cost(
    model: Model = "audiocsrnet",
    branch: Annotated[str | None, typer.Option(help="Only this kind of branch (cnn, slvit, mlp …).")] = None,
    layer: Annotated[
        str | None, typer.Option(help="Only this exit location (V1, AV1, AV2; 1 to 11 in a transformer).")
    ] = None,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT; default: the model's own.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Of a classifier: cifar10, cifar100, speech-commands or gtzan.")
    ] = None,
    format: Annotated[Format, typer.Option()] = Format.table,
) -> None:
    """Show parameters, FLOPS and speedup of every branch, up to and including it."""
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


@commands.command(epilog="Example: `crowdexit tradeoff --model runs/branches --data crowd.h5 --out tradeoff`")
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
    """Compare error and cost of every exit, and recommend practical branches for a budget."""
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
        model, data, split, ids, audio=audio, runtime=runtime, progress=partial(progress_bar, "evaluating")
    )
    measure = "MAE" if "mae" in result["exits"][0] else "wrong answers, %"
    errors = {row["exit"]: row["mae"] if "mae" in row else 100 - row["accuracy"] for row in result["exits"]}
    made = analysis.points(spec, errors)
    audio_note = f", audio: {result['audio']}" if "audio" in result else ""
    title = f"{spec.model} on {data.name}, {split} ({result['samples']} images{audio_note})"
    paths = analysis.write(made, out, title=title, measure_name=measure, budgets=wanted)
    print(paths[1].read_text("utf-8"), end="")
    print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)


@commands.command(
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
    """Build table I of the multi-exit ViT paper from trained runs, and the same for other locations and strategies.

    Runs that differ only in the seed are reported as mean ± standard deviation.
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
        progress = partial(progress_bar, f"evaluating {run}")
        result = evaluate_file(run, path, split, ids, audio=audio, runtime=runtime, progress=progress)
        measure = "MAE" if "mae" in result["exits"][0] else "accuracy"
        values = {row["exit"]: row[measure.lower()] for row in result["exits"]}
        made += analysis.figures(spec, path.stem, values, measure)
    paths = analysis.write(made, out)
    print(paths[1].read_text("utf-8"), end="")
    print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)


@commands.command(epilog="Example: `crowdexit visualize street.jpg --model audiocsrnet-s --exits V1,V1-cnn`")
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
