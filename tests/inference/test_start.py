"""The start of a count: what takes as long to import as PyTorch stays out of it."""

from __future__ import annotations

import subprocess
import sys

SLOW = ("timm", "torchvision", "torch._dynamo", "sympy", "lightning")
COUNT = """
import sys
import numpy as np
import crowdexit
counter = crowdexit.load("audiocsrnet-lite", runtime="eager")
counter.count(np.zeros((64, 64, 3), np.uint8))
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""


def test_nothing_slow_is_imported_to_count():
    run = subprocess.run([sys.executable, "-c", COUNT, *SLOW], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []
