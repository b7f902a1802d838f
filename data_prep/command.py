"""The command ``crowdexit prepare``: one command for each data set."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from crowdexit.utils.command import Interrupted

from .registry import RESUMES, STARTS_AGAIN, command_of, data_sets


class _DataSets(TyperGroup):
    """A command for each data set; its module is imported once it is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self._data_sets = data_sets()
        for name, data_set in self._data_sets.items():
            self.add_command(TyperCommand(name, help=data_set.title))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that the arguments call, ready to run."""
        name, _, rest = super().resolve_command(ctx, args)
        return name, typer.main.get_command(command_of(name or "")), rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command; after Ctrl-C, the line says whether it can be continued."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumes = self._data_sets[ctx.invoked_subcommand].resumes
            raise Interrupted(RESUMES if resumes else STARTS_AGAIN) from None


app = typer.Typer(cls=_DataSets, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def prepare() -> None:
    """Turn a public data set, or your own class folders, into a prepared HDF5 file."""
