"""Exits and policies against smaller networks that have no exits: ``python -m benchmarks.bench_static``.

One classifier with branches, and static ones of the same family that were trained alike, only shallower. On test
pictures: the share of wrong answers against the multiply-adds of an image, for each static network, for each exit by
itself, and for leaving at the first exit that is sure enough. Nothing is chosen on test pictures: the temperatures and
the exits are on validation images, of exits the cheapest and then each that takes off ``--gain`` points of wrong
answers, for whoever goes on pays for all exits on the way.

    crowdexit train cifar10-s-classes --data cifar10-subset.h5 --set epochs=12
    crowdexit train cifar10-s-branches --data cifar10-subset.h5 --set epochs=2
    for depth in 1 3 6 9; do
        crowdexit train cifar10-s-classes --data cifar10-subset.h5 --set epochs=12 --set changes.depth=$depth \\
            --out runs/cifar10-s-depth-$depth
    done
    python -m benchmarks.bench_static --branches runs/cifar10-s-branches --static runs/cifar10-s-depth-* \\
        --data cifar10-subset.h5 --out docs/in-time
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe, in_a_line
from crowdexit.calibration.temperatures import Measure
from crowdexit.data.classes import ClassStore
from crowdexit.evaluation import classify
from crowdexit.evaluation.files import blank, csv_text, write_files
from crowdexit.evaluation.leaving import costs_on_the_way, leaving
from crowdexit.evaluation.tradeoff import Point, costs, points
from crowdexit.inference.models import open_model
from crowdexit.models import zoo
from crowdexit.models.network import FINAL

MEASURES: tuple[Measure, ...] = ("confidence", "entropy")
BOUNDS = np.linspace(0.0, 1.0, 41)[1:]
Scores = Mapping[str, NDArray[np.float32]]


def scored(
    model: str, store: ClassStore, split: str, runtime: str, exits: Sequence[str] | None = None
) -> tuple[zoo.Spec, Scores, NDArray[np.int64]]:
    """A classifier, its exits' scores of a split, and the classes."""
    network, spec, selected = open_model(model, runtime)
    wanted = classify.matching(store, split, "*")
    return spec, *classify.scores_of(selected.ready(network), store, split, wanted, exits=exits)


def wrong(scores: Scores, labels: NDArray[np.int64]) -> dict[str, float]:
    """The share of wrong answers of each exit, in percent."""
    return {name: 100 * float((of_exit.argmax(1) != labels).mean()) for name, of_exit in scores.items()}


def worth_asking(made: Sequence[Point], gain: float) -> list[str]:
    """Of practical exits, by cost, the first and each that is better than the one before it by so much."""
    kept: list[Point] = []
    for point in made:
        if point.practical and (not kept or kept[-1].error - point.error >= gain):
            kept.append(point)
    return [point.exit for point in kept]


def compare(branches: str, statics: Sequence[str], data: Path, runtime: str, gain: float) -> dict[str, Any]:
    """What each static network, each exit worth asking and each policy costs and gets wrong on test images."""
    with ClassStore(data) as store:
        spec, held_out, labels = scored(branches, store, "val", runtime)
        chosen = worth_asking(points(spec, wrong(held_out, labels)), gain)
        exits = [name for name in held_out if name in chosen]  # in the order in which they answer
        temperatures = classify.calibrate(held_out, labels)
        _, scores, truth = scored(branches, store, "test", runtime, [*exits, FINAL])
        found: dict[str, Any] = {"static": [], "exits": [], "policies": {}}
        alone, errors = costs(spec), wrong(scores, truth)
        found["exits"] = [{"name": name, "macs": alone[name], "wrong": errors[name]} for name in exits]
        on_the_way = costs_on_the_way(spec, exits)
        missed = {name: (scores[name].argmax(1) != truth).astype(float) for name in exits}
        for measure in MEASURES:
            uncertainties = {name: temperatures.uncertainties(name, scores[name], measure) for name in exits}
            found["policies"][measure] = [
                {"bound": point.bound, "macs": point.cost, "wrong": 100 * point.error}
                for point in leaving(uncertainties, missed, on_the_way, BOUNDS.tolist())
            ]
        for model in statics:
            of_static, scores, truth = scored(model, store, "test", runtime)
            found["static"].append(
                {"name": Path(model).name, "macs": costs(of_static)[FINAL], "wrong": wrong(scores, truth)[FINAL]}
            )
        found["static"].append({"name": "the backbone", "macs": alone[FINAL], "wrong": errors[FINAL]})
    found["static"].sort(key=lambda point: point["macs"])
    return found


def draw(found: dict[str, Any], title: str, path: Path) -> None:
    """Wrong answers against multiply-adds."""
    figure = blank(8, 5)
    axes = figure.subplots()
    for label, marked, style in (("static networks", "static", "s--"), ("one exit for all", "exits", "o")):
        of = found[marked]
        axes.plot([p["macs"] / 1e9 for p in of], [p["wrong"] for p in of], style, label=label)
        for point in of:
            axes.annotate(point["name"], (point["macs"] / 1e9, point["wrong"]), fontsize=7, xytext=(4, 4),
                          textcoords="offset points")  # fmt: skip
    for measure, curve in found["policies"].items():
        axes.plot([p["macs"] / 1e9 for p in curve], [p["wrong"] for p in curve], "-", label=f"leaving by {measure}")
    axes.set_xlabel("multiply-adds of an image on average, 10⁹")
    axes.set_ylabel("wrong answers, % of test images")
    axes.set_title(title, fontsize=9)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--branches", required=True, help="a classifier with branches: a run's folder or a checkpoint")
    parser.add_argument("--static", nargs="+", required=True, help="smaller ones without")
    parser.add_argument("--data", type=Path, required=True, help="a prepared classification set with val and test")
    parser.add_argument("--gain", type=float, default=1.0, help="points of wrong answers that an exit has to take off")
    parser.add_argument("--runtime", default="eager")
    parser.add_argument("--out", type=Path, required=True, help="folder for static.csv, static.json and static.png")
    args = parser.parse_args()
    found = compare(args.branches, args.static, args.data, args.runtime, args.gain)
    machine = describe()
    rows = [[kind, p["name"], int(p["macs"]), f"{p['wrong']:.2f}"] for kind in ("static", "exits") for p in found[kind]]
    for measure, curve in found["policies"].items():
        rows += [[measure, f"{p['bound']:.3f}", int(p["macs"]), f"{p['wrong']:.2f}"] for p in curve]
    print(f"{args.branches} on {args.data.name}, test; {in_a_line(machine)}")
    for kind, name, macs, error in rows[: len(found["static"]) + len(found["exits"])]:
        print(f"{kind:8} {name:24} {int(macs) / 1e9:8.3f}·10⁹ multiply-adds   {error:>6} % wrong")
    write_files(
        args.out,
        {
            "static.csv": csv_text(["what", "name_or_bound", "multiply_adds", "wrong_percent"], rows),
            "static.json": json.dumps({"machine": machine, "data": args.data.name, **found}, indent=1) + "\n",
            "static.png": lambda path: draw(found, f"{Path(args.branches).name} on {args.data.name}", path),
        },
    )


if __name__ == "__main__":
    main()
