"""How fast int8 is: ``python -m benchmarks.bench_int8``.

The final exit of the default network at 1024×768 on each of its runtimes, and of ``audiocsrnet-s`` in float32 on ONNX
Runtime, on one image, in turn; medians of the ratios of each round. The goal is int8 at least 8 times as fast as
``audiocsrnet-s``, at best 14 times. ``--unfolded`` adds the default network with its batch normalisations as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.bench_runtimes import run_exit
from benchmarks.machine import cache_of_its_own, describe, in_a_line, in_turn, keep
from crowdexit.inference.models import open_model
from crowdexit.models import zoo
from crowdexit.models.network import FINAL
from crowdexit.runtimes.batch import make_batch
from crowdexit.runtimes.calibration import sample
from crowdexit.runtimes.selection import select_runtime

MODEL, BEFORE, SIZE = "audiocsrnet-lite", "audiocsrnet-s", (1024, 768)
RUNTIMES = ("eager", "openvino", "onnx", "openvino-int8")
LEAST_S = 30.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=MODEL, help="a checkpoint with activation ranges")
    parser.add_argument("--rounds", type=int, default=15, help="at least")
    parser.add_argument("--runtimes", nargs="+", default=RUNTIMES)
    parser.add_argument("--unfolded", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    image = cv2.resize(sample()[0], SIZE, interpolation=cv2.INTER_AREA).astype(np.uint8)
    works: dict[str, Callable[[], object]] = {}
    counts: dict[str, float] = {}

    def add(name: str, network: Any, runtime: str) -> None:
        chain, features = select_runtime(runtime).ready(network), make_batch(image, None, network.config)
        works[name] = partial(run_exit, chain, features, [FINAL])
        counts[name] = float(dict(chain.stream(features, [FINAL]))[FINAL].value)

    with cache_of_its_own():
        for runtime in args.runtimes:
            add(runtime, open_model(args.model, runtime)[0], runtime)
            if args.unfolded and runtime != "openvino-int8":
                add(f"{runtime}, unfolded", zoo.load(args.model)[0], runtime)
        add(BEFORE, open_model(BEFORE, "onnx")[0], "onnx")
        times = in_turn(works, args.rounds, LEAST_S if args.rounds > 1 else 0.0)
    machine = describe()
    print(f"{args.model}, {FINAL} at {SIZE[0]}×{SIZE[1]}; {in_a_line(machine)}")
    report: dict[str, Any] = {}
    for name in works:
        report[name] = {
            "seconds": times.median(name),
            "faster_than_before": times.ratio(BEFORE, name),
            "count": counts[name],
        }
        low, high = times.quartiles(BEFORE, name)
        report[name] |= {"quartiles": [low, high]}
        print(
            f"{name:20} {1e3 * times.median(name):8.1f} ms {times.ratio(BEFORE, name):7.2f}× ({low:.2f} to {high:.2f}) "
            f"  count {counts[name]:.2f}"
        )
    if args.unfolded:
        for runtime in [name for name in args.runtimes if name != "openvino-int8"]:
            report[runtime]["faster_folded"] = times.ratio(f"{runtime}, unfolded", runtime)
            print(f"{runtime}: folded {report[runtime]['faster_folded']:.3f} times as fast as unfolded")
    keep({"machine": machine, "model": args.model, "runtimes": report}, args.json)


if __name__ == "__main__":
    main()
