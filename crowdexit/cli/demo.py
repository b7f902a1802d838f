"""``crowdexit demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from crowdexit.cli.options import DEFAULT_MODEL, Model, RuntimeName
from crowdexit.utils import command

# Everything heavy is imported where it is used: `--help` and a mistyped option answer at once.

commands = typer.Typer()


@commands.command(epilog="Example: `crowdexit demo`")
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
