"""What an image costs as the work grows: ``python -m benchmarks.bench_scaling``.

Time against the image's area, the batch and the number of exits, on one runtime, everything in turn in one process.
Linear means: an image of twice the area takes twice the time, a batch of two no more than two images, and all exits
together add no more than each does alone. Random weights, simulated images and sounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench_runtimes import run_exit
from benchmarks.machine import Times, cache_of_its_own, describe, in_a_line, in_turn, keep
from crowdexit.evaluation.files import blank
from crowdexit.models import zoo
from crowdexit.models.network import FINAL
from crowdexit.models.stages import Features, inputs
from crowdexit.runtimes.selection import select_runtime

SIZES = ((256, 128), (384, 192), (512, 256), (768, 384), (1024, 512))
MIDDLE = SIZES[1]
BATCHES = (1, 2, 4, 8)
EXITS = tuple((place, kind) for place in ("V1", "AV1", "AV2") for kind in ("slvit", "cnn"))


def random_features(size: tuple[int, int], batch: int) -> Features:
    """Simulated images and sounds."""
    width, height = size
    return inputs(torch.randn(batch, 3, height, width), torch.randn(batch, 1, 96, 64))


def growth(points: dict[float, float]) -> float:
    """The power by which time grows with work, from a straight line through the logarithms; one is linear."""
    xs, ys = [log(x) for x in points], [log(y) for y in points.values()]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def steepest(points: dict[float, float]) -> float:
    """The same power between one point and the next, where it is largest."""
    pairs = pairwise(points.items())
    return max(log(later / earlier) / log(more / less) for (less, earlier), (more, later) in pairs)


def measure(model: str, runtime: str, largest: int, rounds: int) -> tuple[str, dict[str, dict[float, float]], float]:
    """The runtime's name; seconds by area (in megapixels), batch, and number of early exits asked; what all exits
    together add over what each adds alone.
    """
    exits = tuple(zoo.ExitSpec(f"{place}-{kind}", place, kind) for place, kind in EXITS)
    works: dict[str, dict[Any, Callable[[], object]]] = {"area": {}, "batch": {}, "exits": {}}
    alone: dict[str, Callable[[], object]] = {}
    # ``auto`` is asked once: another size could get another runtime.
    for size in sorted((size for size in SIZES if size[0] <= largest), key=lambda size: size != MIDDLE):
        torch.manual_seed(0)
        network = zoo.build(zoo.Spec(model, exits=exits, changes={"size": size})).eval()
        chain = select_runtime(runtime).ready(network)
        runtime = chain.runtime
        works["area"][size[0] * size[1] / 1e6] = partial(run_exit, chain, random_features(size, 1), [FINAL])
        if size == MIDDLE:
            *early, _ = network.exit_names
            for batch in BATCHES:
                works["batch"][batch] = partial(run_exit, chain, random_features(size, batch), [FINAL])
            for number in range(len(early) + 1):
                works["exits"][number] = partial(run_exit, chain, random_features(size, 1), [*early[:number], FINAL])
            alone = {name: partial(run_exit, chain, random_features(size, 1), [name, FINAL]) for name in early}
    # An exit adds a hundredth: what it adds is told from the noise by many rounds, which are short.
    of_exits = in_turn({**works["exits"], **alone}, 5 * rounds)
    times = {"exits": of_exits, **{kind: in_turn(works[kind], rounds) for kind in ("area", "batch")}}
    seconds = {kind: {x: times[kind].median(x) for x in sorted(works[kind])} for kind in works}
    return runtime, seconds, together(of_exits, list(alone))


def together(times: Times, early: list[str]) -> float:
    """The time with all exits over the time without, were each to add what it adds alone."""
    without = times.median(0)
    return times.median(len(early)) / (without + sum(times.median(name) - without for name in early))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--rounds", type=int, default=11)
    widths = [width for width, _ in SIZES if width >= MIDDLE[0]]
    parser.add_argument("--largest", type=int, default=widths[-1], choices=widths, help="width of the largest image")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--plot", type=Path, help="draw them there, as a PNG")
    args = parser.parse_args()
    with cache_of_its_own():
        runtime, seconds, exits = measure(args.model, args.runtime, args.largest, args.rounds)
    powers = {kind: growth(seconds[kind]) for kind in ("area", "batch")}
    most = {kind: steepest(seconds[kind]) for kind in powers}
    machine = describe()
    print(f"{args.model} on {runtime}; {in_a_line(machine)}")
    for kind, unit in (("area", "megapixels"), ("batch", "images")):
        print(f"time grows with the {kind} to the power of {powers[kind]:.2f} ({most[kind]:.2f} where it is steepest)")
        for x, taken in seconds[kind].items():
            print(f"  {x:8.3f} {unit:10} {1e3 * taken:8.1f} ms   {1e3 * taken / x:8.1f} ms each")
    print(f"all exits together take {exits:.3f} of what each of them alone lets expect")
    for number, taken in seconds["exits"].items():
        print(f"  {number:8.0f} exits more {1e3 * taken:8.1f} ms   {taken / seconds['exits'][0]:8.3f}× none")
    keep(
        {
            "machine": machine,
            "model": args.model,
            "runtime": runtime,
            "growth": powers,
            "steepest": most,
            "exits_together": exits,
            "seconds": seconds,
        },
        args.json,
    )
    if args.plot is not None:
        figure = blank(12, 4)
        for ax, (kind, points) in zip(figure.subplots(1, 3), seconds.items(), strict=True):
            ax.plot(list(points), [1e3 * taken for taken in points.values()], "o-")
            ax.set_xlabel({"area": "megapixels", "batch": "images at once", "exits": "early exits asked"}[kind])
            ax.set_ylabel("ms")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
        figure.savefig(args.plot)


if __name__ == "__main__":
    main()
