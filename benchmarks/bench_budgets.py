"""What a budget buys, and whether it is kept: ``python -m benchmarks.bench_budgets --data heard.h5 --out bench``.

All images of a split are counted together, once with every exit asked of every image, which takes some time, then
within shares of that time. Told are the time that was used, the mean absolute error, and who left where; beside it,
what each exit alone takes and gets wrong, if all images are sent there. Budgets go by errors that were calibrated on
validation pictures: on these the errors told here are no measure of images never seen, the times are.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.machine import describe, in_a_line
from crowdexit.data.store import Store
from crowdexit.evaluation.evaluate import read_for_counting
from crowdexit.evaluation.files import blank, csv_text, write_files
from crowdexit.inference.budget import BudgetError
from crowdexit.inference.counter import CrowdCounter, load
from crowdexit.results import CountResult

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def timed(results: Any) -> tuple[list[CountResult], float]:
    """All results, and the seconds that they took."""
    begun = perf_counter()
    return list(results), perf_counter() - begun


def mae(results: Sequence[CountResult], truths: Sequence[float]) -> float:
    """Of the answers that were chosen."""
    return float(np.mean([abs(result.count - truth) for result, truth in zip(results, truths, strict=True)]))


def compare(counter: CrowdCounter, samples: list[Any], truths: list[float]) -> dict[str, Any]:
    """Times in milliseconds for all images, and errors: of budgets, and of each exit alone."""
    _ = counter.profile
    timed(counter.count_many(samples[:8]))  # warms up
    _, everything = timed(counter.count_many(samples))
    report: dict[str, Any] = {"everything_ms": 1e3 * everything, "exits": [], "budgets": []}
    for name in counter.exits:
        results, seconds = timed(counter.count_many(samples, exits=[name]))
        report["exits"].append({"exit": name, "ms": 1e3 * seconds, "mae": mae(results, truths)})
    for share in SHARES:
        budget = 1e3 * share * everything
        try:
            results, seconds = timed(counter.count_many(samples, budget_ms=budget))
        except BudgetError as error:
            report["budgets"].append({"budget_ms": budget, "error": str(error)})
            continue
        left = Counter(result.chosen.exit for result in results)
        report["budgets"].append(
            {
                "budget_ms": budget,
                "used_ms": 1e3 * seconds,
                "mae": mae(results, truths),
                "left": {name: left[name] for name in counter.exits},
            }
        )
    return report


def draw(report: dict[str, Any], number: int, title: str, path: Path) -> None:
    """Error against time an image."""
    figure = blank(8, 5)
    axes = figure.subplots()
    kept = [b for b in report["budgets"] if "mae" in b]
    axes.plot([b["used_ms"] / number for b in kept], [b["mae"] for b in kept], "o-", label="budgets")
    axes.plot(
        [e["ms"] / number for e in report["exits"]], [e["mae"] for e in report["exits"]], "s", label="one exit for all"
    )
    for e in report["exits"]:
        axes.annotate(e["exit"], (e["ms"] / number, e["mae"]), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("milliseconds an image")
    axes.set_ylabel("MAE")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--out", type=Path, required=True, help="folder for budgets.csv, budgets.json and budgets.png")
    args = parser.parse_args()
    counter = load(args.model, runtime=args.runtime)
    with Store(args.data) as store:
        read = [read_for_counting(store, args.split, id, audio=False) for id in store.ids(args.split, "*")]
    report = compare(counter, [(image, None) for image, *_ in read], [count for _, _, count, _ in read])
    machine, runtime = describe(), counter.chain.runtime
    print(f"{counter.model} on {runtime}, {len(read)} images of {args.split} without audio; {in_a_line(machine)}")
    for row in report["exits"]:
        print(f"  all to {row['exit']:6} {row['ms'] / 1e3:7.2f} s   MAE {row['mae']:6.1f}")
    rows = [["exit", row["exit"], f"{row['ms']:.0f}", f"{row['mae']:.2f}", ""] for row in report["exits"]]
    for row in report["budgets"]:
        if "error" in row:
            print(f"  {row['budget_ms'] / 1e3:7.2f} s   {row['error']}")
            continue
        left = ", ".join(f"{name} {number}" for name, number in row["left"].items() if number)
        used = row["used_ms"] / row["budget_ms"]
        print(f"  {row['budget_ms'] / 1e3:7.2f} s, {used:6.1%} of it used   MAE {row['mae']:6.1f}   {left}")
        rows.append(["budget", f"{row['budget_ms']:.0f}", f"{row['used_ms']:.0f}", f"{row['mae']:.2f}", left])
    title = f"{counter.model} on {runtime}, {args.split}"
    write_files(
        args.out,
        {
            "budgets.csv": csv_text(["what", "exit_or_budget_ms", "used_ms", "mae", "left"], rows),
            "budgets.json": json.dumps({"machine": machine, "runtime": runtime, **report}, indent=1) + "\n",
            "budgets.png": lambda path: draw(report, len(read), title, path),
        },
    )


if __name__ == "__main__":
    main()
