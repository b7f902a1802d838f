"""Commands that packages add to ``crowdexit`` by entry point, such as the page and data preparation.

An entry point of the group ``crowdexit.commands`` names a command and its ``typer.Typer``. The package itself imports
none of them.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import typer
from typer.core import TyperGroup

GROUP = "crowdexit.commands"


class ExtensibleGroup(TyperGroup):
    """A group of commands, and those of the installed extensions after them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands, in the order of the help."""
        return [*super().list_commands(ctx), *sorted(_extensions())]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        own = super().get_command(ctx, cmd_name)
        return own if own is not None or cmd_name not in _extensions() else _command(cmd_name)


@cache
def _extensions() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


@cache
def _command(name: str) -> Any:
    entry = _extensions()[name]
    made = typer.main.get_command(getattr(_imported(entry.module), entry.attr))
    made.name = name
    return made


def _imported(name: str) -> ModuleType:
    """A module of an extension. Our own are inside the package once installed, next to it in a checkout."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}.") or not name.startswith("crowdexit."):
            raise
    return import_module(name.removeprefix("crowdexit."))
