"""What a picture costs as the work grows: ``python -m benchmarks.bench_scaling``.

Time against the picture's area, the batch and the number of exits, on one runtime, everything in turn in one process.
Linear means: a picture of twice the area takes twice the time, a batch of two no more than two pictures, and each exit
adds what it costs itself. Random weights, simulated pictures and sounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe, in_a_line, in_turn
from crowdexit import zoo
from crowdexit.analysis.files import blank
from crowdexit.inference.runtimes.base import ReadyChain
from crowdexit.inference.runtimes.pick import pick
from crowdexit.network import FINAL
from crowdexit.stages import Features, inputs

SIZES = ((256, 128), (384, 192), (512, 256), (768, 384), (1024, 512))
BATCHES = (1, 2, 4, 8)
EXITS = tuple((place, kind) for place in ("V1", "AV1", "AV2") for kind in ("slvit", "cnn"))


def seen(size: tuple[int, int], batch: int) -> Features:
    """Simulated pictures and sounds."""
    width, height = size
    return inputs(torch.randn(batch, 3, height, width), torch.randn(batch, 1, 96, 64))


def run(chain: ReadyChain, features: Features, exits: list[str]) -> None:
    """Ask these exits."""
    for _ in chain.stream(features, exits):
        pass


def growth(points: dict[float, float]) -> float:
    """The power by which time grows with work, from a straight line through the logarithms; one is linear."""
    xs, ys = [log(x) for x in points], [log(y) for y in points.values()]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--largest", type=int, default=SIZES[-1][0], help="width of the largest picture")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw them there, as a PNG")
    args = parser.parse_args()
    exits = tuple(zoo.ExitSpec(f"{place}-{kind}", place, kind) for place, kind in EXITS)
    works: dict[str, dict[float, Callable[[], object]]] = {"area": {}, "batch": {}, "exits": {}}
    for size in [size for size in SIZES if size[0] <= args.largest]:
        torch.manual_seed(0)
        network = zoo.build(zoo.Spec(args.model, exits=exits, changes={"size": size})).eval()
        chain = pick(args.runtime).ready(network)
        works["area"][size[0] * size[1] / 1e6] = partial(run, chain, seen(size, 1), [FINAL])
        if size == SIZES[1]:
            names = network.exit_names
            for batch in BATCHES:
                works["batch"][batch] = partial(run, chain, seen(size, batch), [FINAL])
            for number in range(len(names)):
                works["exits"][number] = partial(run, chain, seen(size, 1), [*names[:number], FINAL])
    flat = {f"{kind} {x}": work for kind, of_kind in works.items() for x, work in of_kind.items()}
    seconds = in_turn(flat, args.rounds)
    times = {kind: {x: seconds[f"{kind} {x}"] for x in of_kind} for kind, of_kind in works.items()}
    powers = {kind: growth(times[kind]) for kind in ("area", "batch")}
    machine = describe()
    print(f"{args.model} on {chain.runtime}; {in_a_line(machine)}")
    for kind, unit in (("area", "megapixels"), ("batch", "pictures")):
        print(f"time grows with the {kind} to the power of {powers[kind]:.2f}")
        for x, taken in times[kind].items():
            print(f"  {x:8.3f} {unit:10} {1e3 * taken:8.1f} ms   {1e3 * taken / x:8.1f} ms each")
    alone = times["exits"][0]
    for number, taken in times["exits"].items():
        print(f"  {number:8.0f} exits more {1e3 * taken:8.1f} ms   {taken / alone:8.3f}× none")
    if args.json is not None:
        made: dict[str, Any] = {
            "machine": machine,
            "model": args.model,
            "runtime": chain.runtime,
            "growth": powers,
            "seconds": times,
        }
        part = args.json.with_name(args.json.name + ".part")
        part.write_text(json.dumps(made, indent=1), "utf-8")
        part.replace(args.json)
    if args.plot is not None:
        figure = blank(12, 4)
        for ax, (kind, points) in zip(figure.subplots(1, 3), times.items(), strict=True):
            ax.plot(list(points), [1e3 * taken for taken in points.values()], "o-")
            ax.set_xlabel({"area": "megapixels", "batch": "pictures at once", "exits": "early exits asked"}[kind])
            ax.set_ylabel("ms")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
        figure.savefig(args.plot)


if __name__ == "__main__":
    main()
