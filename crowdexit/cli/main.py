"""The command line, from its groups of commands."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer

from crowdexit.cli import calibrate, count, demo, evaluate, export, train
from crowdexit.cli.extensions import ExtensibleGroup
from crowdexit.utils import command

# In ``--help``; what is not here comes after these.
_ORDER = (
    *("count", "evaluate", "cost", "tradeoff", "table", "train", "suite", "search", "visualize", "copycat"),
    *("compress", "export", "cross-fit", "calibrate", "calibrate-int8", "demo"),
)


class _Ordered(ExtensibleGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: [*_ORDER, name].index(name))


app = typer.Typer(
    cls=_Ordered,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Count a crowd from image and audio, with an answer whenever the time is up.",
)
for group in (count, evaluate, train, export, calibrate, demo):
    app.add_typer(group.commands)


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


def main() -> None:
    """The entry point of the ``crowdexit`` command."""
    sys.exit(command.run(app))


if __name__ == "__main__":
    main()
