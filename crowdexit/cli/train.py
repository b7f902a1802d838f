"""Training: one recipe, the suites of the papers, searches, and fine-tuning on unlabelled data."""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from crowdexit.cli.options import RuntimeName
from crowdexit.errors import CrowdExitError
from crowdexit.utils import command
from crowdexit.utils.progress import progress_bar

# Everything heavy is imported where it is used: `--help` and a mistyped option answer at once.

commands = typer.Typer()


@commands.command(epilog="Example: `crowdexit train audiocsrnet-s-density --data crowd.h5 --out runs/mine --resume`")
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a bundled recipe's name.")],
    data: Annotated[Path | None, typer.Option(help="A prepared HDF5 file, instead of the recipe's.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the run; default: runs/NAME.", callback=command.output_folder)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in this folder.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value, e.g. data.hear=0.7.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="GPUs, or processes on the CPU.")] = 1,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or gpu.")] = "auto",
) -> None:
    """Run one experiment: a recipe."""
    import yaml

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


@commands.command(epilog="Example: `crowdexit suite table-iv --data cifar10.h5 --out runs/table-iv --jobs 2`")
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

    Finished runs are skipped, interrupted ones resumed; a failed run does not stop the others.
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
    with progress_bar("training", len(runs)) as advance:

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
                result = evaluate_file(path, data, split, runtime=runtime, progress=partial(progress_bar, run.name))
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


@commands.command(epilog="Example: `crowdexit search runs/branches --data cifar10.h5 --place 1 --heads 2,4,8,12,16`")
def search(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose branches were trained classifier-wise.")],
    data: Annotated[Path, typer.Option(help="The prepared HDF5 file that it was trained on.")],
    place: Annotated[str, typer.Option(help="Exit location of the branches.")],
    dims: Annotated[str, typer.Option(help="Widths d to try, with commas between.")] = "32",
    heads: Annotated[str, typer.Option(help="Numbers of heads h to try, with commas between.")] = "2,4,8,12,16,24",
    out: Annotated[
        Path, typer.Option(help="Folder of the run and of grid.csv, .md and .png.", callback=command.output_folder)
    ] = Path("search"),
    resume: Annotated[bool, typer.Option("--resume", help="Resume the search in this folder.")] = False,
) -> None:
    """Search d and h of an SL-ViT branch for the best with no more parameters than the CNN branch."""
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
        raise CrowdExitError(f"{option} {text}: expected comma-separated whole numbers") from None


@commands.command(
    epilog="Example: `crowdexit copycat runs/branches --pictures holiday/ --data cifar10.h5 --out runs/cc`"
)
def copycat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run whose branches were trained classifier-wise.")],
    data: Annotated[Path, typer.Option(help="The prepared HDF5 file that it was trained on.")],
    pictures: Annotated[
        Path, typer.Option(help="Folder of unlabelled images (for audio sets: recordings), or a prepared file.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the new run.", callback=command.output_folder)],
    split: Annotated[str, typer.Option(help="Of a prepared file with --pictures.")] = "train",
    ratio: Annotated[float, typer.Option(help="Unlabelled samples for each labelled one.")] = 2.0,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint whose final exit labels them; default: the run's own backbone.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: the run's own.")] = None,
    lr: Annotated[float | None, typer.Option(help="Default: a tenth of the run's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the run in this folder.")] = False,
) -> None:
    """Fine-tune trained branches on unlabelled images or audio, labelled by the backbone or another teacher."""
    from crowdexit.training.copycat import copycat_recipe
    from crowdexit.training.run import train as run_training

    recipe = copycat_recipe(run, data, pictures, split=split, ratio=ratio, teacher=teacher, epochs=epochs, lr=lr)
    print(run_training(recipe, out, resume=resume, console=Console(stderr=True)))
