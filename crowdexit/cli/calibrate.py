"""Calibrate a trained network: intervals, temperatures, and the ranges for int8."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from crowdexit.cli.options import Ids, RuntimeName
from crowdexit.utils import command
from crowdexit.utils.progress import progress_bar

if TYPE_CHECKING:
    from crowdexit.models.network import MultiExitNetwork
    from crowdexit.models.zoo import Spec
    from crowdexit.runtimes.base import Runtime


# Everything heavy is imported where it is used: `--help` and a mistyped option answer at once.

commands = typer.Typer()

CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)  # whose worth is shown


@commands.command("cross-fit", epilog="Example: `crowdexit cross-fit runs/fold-* --data crowd.h5 --out counts.csv`")
def cross_fit(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Runs that each left out one fold.")],
    data: Annotated[Path, typer.Option(help="The prepared HDF5 file that they were trained on.")],
    out: Annotated[Path, typer.Option(help="The table to write.", callback=command.output_file)] = Path("counts.csv"),
    runtime: RuntimeName = "auto",
) -> None:
    """Count training images with networks that were trained without them, for `crowdexit calibrate --held-out`."""
    from crowdexit.evaluation.cross_fit import cross_fit as run_cross_fit

    images = run_cross_fit(runs, data, out, runtime=runtime, progress=partial(progress_bar, "counting"))
    print(f"{out}: {images} images")


@commands.command(epilog="Example: `crowdexit calibrate runs/audiocsrnet-s-branches --data crowd.h5 --split val`")
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
    """Calibrate a checkpoint or an export on held-out images.

    For counting: intervals of each exit and, if the file has training images, their statistics, to report unfamiliar
    images. For classification: temperatures, and a table of early exits by confidence.
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
        with progress_bar("calibrating", 2 * len(wanted)) as advance:
            intervals = run_calibration(
                counter, store, split, wanted, level, cross_fitted=cross_fitted, progress=advance
            )
        familiarity = None
        if trained_on:
            with progress_bar("describing training images", len(trained_on)) as advance:
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
    from crowdexit.inference.counter import default_exits
    from crowdexit.inference.models import keep_calibration

    with ClassStore(data) as store:
        wanted = classify.matching(store, split, ids)
        with progress_bar("calibrating", len(wanted)) as advance:
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
    exits = default_exits(network)
    bounds = [1 - confidence for confidence in CONFIDENCES]
    made = leaving(
        {name: temperatures.uncertainties(name, scores[name], "confidence") for name in exits},
        {name: (scores[name].argmax(1) != labels).astype(float) for name in exits},
        costs_on_the_way(spec, exits),
        bounds,
    )
    table = Table(title="exit at a confidence of …")
    for name in ("confidence", "accuracy %", "multiply-adds, 10⁹", *(f"{name} %" for name in exits)):
        table.add_column(name, justify="right")
    for point in made:
        shares = (f"{100 * point.shares[name]:.0f}" for name in exits)
        table.add_row(f"{1 - point.bound:.2f}", f"{100 * (1 - point.error):.2f}", f"{point.cost / 1e9:.3g}", *shares)
    Console().print(table)


@commands.command(epilog="Example: `crowdexit calibrate-int8 runs/audiocsrnet-lite --data crowd.h5`")
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
    with progress_bar("measuring", MOST) as advance:
        ranges = measure_ranges(network, [*of_file(data, split, network)], advance)
    zoo.write_ranges(path, ranges)
    print(f"{path}: the ranges of {len(ranges)} layers")
