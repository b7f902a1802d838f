"""What smaller images save, and what they cost: ``python -m benchmarks.bench_sizes --data heard.h5 --out bench``.

A network counts the images of a split at its own size, with its early exits, and at smaller ones with its final exit
alone, since early exits belong to the size that they were trained at. Told are the images a second that the network
takes in batches, as of a video, all sizes in turn in one process, and the mean absolute error; both without audio. The
network was trained at its own size: what it would do trained at another, this does not tell.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import cache_of_its_own, describe, in_a_line, in_turn, keep
from crowdexit.data.store import Store
from crowdexit.evaluation.cost import cost_of
from crowdexit.evaluation.evaluate import count_samples
from crowdexit.evaluation.files import blank, csv_text, write_files
from crowdexit.inference.counter import CrowdCounter
from crowdexit.jobs.options import BATCH
from crowdexit.models import zoo
from crowdexit.models.network import FINAL
from crowdexit.runtimes.selection import select_runtime

SIZES = ("768x576", "512x384", "384x288", "320x240", "256x192")


def counters(model: str, runtime: str, sizes: list[str]) -> tuple[dict[str, CrowdCounter], dict[str, float]]:
    """A counter for the network's own size and for each of the others, and the FLOP of an image at each."""
    network, spec = zoo.load(model)
    made = {f"{network.config.size[0]}x{network.config.size[1]}": (network, spec)}
    alone = zoo.with_exits(network, spec, [])
    for size in sizes:
        if size not in made:
            made[size] = zoo.at_size(*alone, zoo.parse_size(size, zoo.step_of(alone[0])))
    flops = {size: cost_of(spec, model).backbone_flops for size, (_, spec) in made.items()}
    return {
        size: CrowdCounter(network, model, runtime=select_runtime(runtime)) for size, (network, _) in made.items()
    }, flops


def errors(
    counter: CrowdCounter, store: Store, split: str, groups: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """By exit, the mean absolute error in each group of ids."""
    off: dict[str, dict[str, float]] = {name: {} for name in counter.exits}
    for group, ids in groups.items():
        counted = list(count_samples(counter, store, split, ids, audio=False))
        for at, name in enumerate(counter.exits):
            off[name][group] = float(np.mean([abs(s.results[at].count - s.truth) for s in counted]))
    return off


def draw(rows: list[dict[str, Any]], groups: list[str], title: str, path: Path) -> None:
    """Error against images a second, one image for each group."""
    figure = blank(5 * len(groups), 4.5)
    for axes, group in zip(np.atleast_1d(figure.subplots(1, len(groups))), groups, strict=True):
        lines = {
            "final exit, smaller images": [r for r in rows if r["exit"] == FINAL],
            "exits at its own size": [r for r in rows if r["size"] == rows[0]["size"]],
        }
        for what, some in lines.items():
            axes.plot([r["fps"] for r in some], [r["mae"][group] for r in some], "o-", label=what)
        for r in rows:
            name = r["size"] if r["exit"] == FINAL else r["exit"]
            axes.annotate(name, (r["fps"], r["mae"][group]), xytext=(4, 4), textcoords="offset points", fontsize=7)
        axes.axvline(25, color="black", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("images a second")
        axes.set_ylabel(f"MAE, {group}")
        axes.set_title(title, fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--sizes", nargs="*", default=list(SIZES))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--groups", nargs="+", default=["A_*", "B_*"], help="shell patterns of ids")
    parser.add_argument("--rounds", type=int, default=3, help="of measuring speed, at least")
    parser.add_argument("--out", type=Path, required=True, help="folder for sizes.csv, sizes.json and sizes.png")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    with cache_of_its_own(), Store(args.data) as store:
        groups = {group: store.ids(args.split, group) for group in args.groups}
        served, flops = counters(args.model, args.runtime, args.sizes)
        works: dict[tuple[str, str], Callable[[], object]] = {}
        for size, counter in served.items():
            width, height = counter.size
            images = random.integers(0, 255, (BATCH, height, width, 3), np.uint8)
            ready = counter.prepare([(image, None) for image in images])
            works |= {(size, name): partial(counter.answers, ready, exit=name) for name in counter.exits}
        times = in_turn(works, args.rounds)
        off = {size: errors(counter, store, args.split, groups) for size, counter in served.items()}
    rows = [
        {
            "size": size,
            "exit": name,
            "runtime": served[size].chain.runtime,
            "gflop": flops[size] / 1e9 if name == FINAL else None,
            "fps": BATCH / times.median((size, name)),
            "mae": off[size][name],
        }
        for size, name in works
    ]
    machine = describe()
    print(f"{args.model}, {args.split}, without audio; {in_a_line(machine)}")
    print(f"{'size':10} {'exit':8} {'runtime':14} {'GFLOP':>7} {'a second':>9}   MAE " + "  ".join(args.groups))
    table = []
    for row in rows:
        cost = "" if row["gflop"] is None else f"{row['gflop']:.1f}"
        maes = [f"{row['mae'][group]:.1f}" for group in args.groups]
        table.append([row["size"], row["exit"], row["runtime"], cost, f"{row['fps']:.2f}", *maes])
        print(f"{row['size']:10} {row['exit']:8} {row['runtime']:14} {cost:>7} {row['fps']:9.1f}   {'  '.join(maes)}")
    runtimes = ", ".join(dict.fromkeys(row["runtime"] for row in rows))
    title = f"{args.model} on {runtimes}, {args.split}, without audio"
    write_files(
        args.out,
        {
            "sizes.csv": csv_text(["size", "exit", "runtime", "gflop", "pictures_a_second", *args.groups], table),
            "sizes.png": lambda path: draw(rows, args.groups, title, path),
        },
    )
    keep({"machine": machine, "model": args.model, "split": args.split, "rows": rows}, args.out / "sizes.json")


if __name__ == "__main__":
    main()
