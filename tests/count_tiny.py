"""``crowdexit count`` with the tests' tiny network, slowed down: a process to be killed.

python count_tiny.py SECONDS-A-BATCH OUT FORMAT INPUT…, with the tests' folders in PYTHONPATH
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tiny import tiny_counter

from crowdexit.jobs.count import count_inputs
from crowdexit.jobs.options import CountOptions

if __name__ == "__main__":
    pause, out, format, *inputs = sys.argv[1:]
    counter = tiny_counter()
    answers = counter.answers

    def slow(*arguments, **options):
        time.sleep(float(pause))
        return answers(*arguments, **options)

    counter.answers = slow
    resume = format != "table" and inputs != ["-"]
    count_inputs(counter, inputs, CountOptions(out=Path(out), format=format, fps=10, resume=resume))
