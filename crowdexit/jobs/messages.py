"""Lines on the standard error."""

from __future__ import annotations

import sys


def warn(line: str) -> None:
    """Print a warning."""
    say(f"warning: {line}")


def say(line: str) -> None:
    """Print a line on the standard error."""
    print(line, file=sys.stderr)
