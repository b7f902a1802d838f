"""How long commands take from the shell to their end: ``python -m benchmarks.bench_start``.

Medians of some runs each, in turns beside a bare ``import torch``, which none that computes can be faster than. Asked
are 5 s of ``cost``, 6 s of a second ``count`` of one image, and 0.5 s of ``--help``, on an idle machine whose packages
have been compiled to bytecode: installing with pip does that, uv with ``--compile-bytecode``, else the first run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.machine import describe, in_a_line, keep

STREET = Path(__file__).parent.parent / "crowdexit" / "samples" / "street.jpg"
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "import torch": (["-c", "import torch"], None),
    "crowdexit --help": (["-m", "crowdexit", "--help"], 0.5),
    "crowdexit cost": (["-m", "crowdexit", "cost"], 5.0),
    "crowdexit count street.jpg": (["-m", "crowdexit", "count", str(STREET)], 6.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(args.runs + 1):
        for name, (arguments, _) in COMMANDS.items():
            begun = perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            if number > 0:  # the first run may compile and choose a runtime
                seconds[name].append(perf_counter() - begun)
    figures: dict[str, Any] = {"machine": describe(), "seconds": seconds}
    print(in_a_line(figures["machine"]))
    bare = median(seconds["import torch"])
    for name, (_, asked) in COMMANDS.items():
        took = median(seconds[name])
        goal = "" if asked is None else f"  ({'reached' if took <= asked else 'missed'}: {asked:g} s)"
        print(f"{name:28} {took:5.2f} s  {took / bare:4.1f} × import torch{goal}")
    keep(figures, args.json)


if __name__ == "__main__":
    main()
