"""How every command of the project ends: 0, or 2 with one line, or 130 after Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from crowdexit.errors import CrowdExitError

# typer shows the class of every misuse of a command line only as a parent of this one.
_Misuse: type[Exception] = typer.BadParameter.__mro__[1]


def run(app: typer.Typer, arguments: Sequence[str] | None = None, *, interrupted: str = "interrupted") -> int:
    """Run a command line and return its exit code; what a user can mend becomes one line on stderr.

    Args:
        arguments: instead of the process's own.
        interrupted: the line to print after Ctrl-C.
    """
    try:
        code = int(typer.main.get_command(app)(arguments, standalone_mode=False) or 0)
    except CrowdExitError as error:
        return _refuse(str(error))
    except _Misuse as error:
        return _refuse(error.format_message())  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:
        print(interrupted, file=sys.stderr)
    return code


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2
