"""The data sets that can be prepared. Each describes itself in its own file, as ``DATA_SET``."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal

import typer

from crowdexit.utils.signals import INTERRUPTED

RESUMES = f"{INTERRUPTED}; the same command resumes it"
STARTS_AGAIN = f"{INTERRUPTED}; nothing was written"


@dataclass(frozen=True)
class DataSet:
    """A data set that a module of this folder prepares with its command ``app``.

    Attributes:
        title: what it is, in a line.
        task: what its samples have: counts, or classes.
        has_audio: whether they have audio, beside images or in their place.
        has_heads: whether heads are annotated, of which density maps are made.
        resumes: whether an interrupted preparation is continued by the same command.
    """

    title: str
    task: Literal["counting", "classification"]
    has_audio: bool = False
    has_heads: bool = False
    resumes: bool = True


def data_sets() -> dict[str, DataSet]:
    """All data sets, by the names of their commands.

    Read from the source: importing the modules takes seconds, PyTorch and all. ``DATA_SET`` is therefore made of
    literals.
    """
    found = {module.replace("_", "-"): _described(path) for module, path in _modules().items()}
    return {name: data_set for name, data_set in found.items() if data_set is not None}


def command_of(name: str) -> typer.Typer:
    """The command that prepares a data set.

    Args:
        name: one of :func:`data_sets`.
    """
    app: typer.Typer = import_module(f"{__package__}.{name.replace('-', '_')}").app
    return app


def _modules() -> dict[str, Path]:
    folders = import_module(__package__ or "").__path__
    return {
        module.name: Path(folder) / f"{module.name}.py" for folder in folders for module in iter_modules([str(folder)])
    }


def _described(path: Path) -> DataSet | None:
    """The data set of a module, or None: it prepares none."""
    source = path.read_text("utf-8")
    if "\nDATA_SET = " not in source:
        return None
    for node in ast.parse(source).body:
        match node:
            case ast.Assign([ast.Name("DATA_SET")], ast.Call(args=args, keywords=keywords)):
                return DataSet(
                    *map(ast.literal_eval, args), **{k.arg or "": ast.literal_eval(k.value) for k in keywords}
                )
    return None
