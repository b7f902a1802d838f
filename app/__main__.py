"""``python -m app`` is ``crowdexit app``."""

from __future__ import annotations

import sys

from crowdexit.cli import commands as cli
from crowdexit.utils import command

if __name__ == "__main__":
    sys.exit(command.run(cli.app, ["app", *sys.argv[1:]]))
