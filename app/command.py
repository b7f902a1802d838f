"""The command of the page: ``crowdexit app``."""

from __future__ import annotations

from typing import Annotated

import typer

from crowdexit.cli.options import DEFAULT_MODEL, Model, RuntimeName

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command(epilog="Example: `crowdexit app --port 7860`")
def page(
    model: Model = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
    host_name: Annotated[
        list[str] | None, typer.Option(help="A further host name of the page, besides --host; may be repeated.")
    ] = None,
    runtime: RuntimeName = "auto",
) -> None:
    """Open the page: drop an image in, see the count at every exit."""
    from .page import launch

    launch(model, host=host, port=port, runtime=runtime, names=host_name or [])
