"""Registries that fill themselves: a module that is there registers what it has."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules


def import_modules(package: str) -> None:
    """Import every module of a package, so that each registers what it adds.

    Args:
        package: its name, of which the modules right below it are imported.
    """
    for module in iter_modules(import_module(package).__path__):
        import_module(f"{package}.{module.name}")
