"""``python -m app`` is ``crowdexit app``."""

from __future__ import annotations

import sys

from crowdexit.utils import command

from .command import app

if __name__ == "__main__":
    sys.exit(command.run(app))
