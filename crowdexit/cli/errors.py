"""Errors of the library, as the command line shows them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from crowdexit.errors import CrowdExitError, OptionError


@contextmanager
def flags_in_errors() -> Iterator[None]:
    """Name settings by their flags in errors of the library."""
    try:
        yield
    except OptionError as error:
        raise CrowdExitError(error.with_names(lambda name: f"--{name.replace('_', '-')}")) from None
