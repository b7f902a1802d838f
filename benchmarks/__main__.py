"""All benchmarks of speed in one command: ``python -m benchmarks --out bench``.

Each is run by itself, one after the other, in a process of its own; what came out stands in
``bench/benchmarks.json``, ``bench/benchmarks.md`` (what was to be reached, what was) and ``bench/benchmarks.png``.
Nothing else should run meanwhile. ``--quick`` uses tiny sizes: it shows that everything runs, its figures mean
nothing. On a machine with a CUDA GPU its runtimes are measured too.

Accuracy against cost needs trained networks and data: ``python -m benchmarks.bench_static --help``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from benchmarks.bench_deadlines import STATES
from benchmarks.machine import describe, in_a_line
from crowdexit.evaluation.files import blank, markdown_table, write_files

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """One thing to be reached, as told in the table.

    Attributes:
        what: is measured. goal: what is to be reached, in words. found: what was. reached: None where it is only shown.
    """

    what: str
    goal: str
    found: str
    reached: bool | None


@dataclass(frozen=True)
class Bench:
    """A benchmark: its arguments, those that make it quick, what its figures say of its targets, and its image."""

    arguments: tuple[str, ...]
    quick: tuple[str, ...]
    targets: Callable[[Figures], list[Target]]
    draw: Callable[[Any, Figures], None]


# A density map that has nothing to do with the plain one is as far from it as it is large, or farther. Random weights
# forgive little: int8, half a per cent off in trained counts (``bench_agreement``), is at a half here.
_RUBBISH = 1.0


def _runtimes(figures: Figures) -> list[Target]:
    audio = {name: r for name, r in figures["runtimes"].items() if r["off_plain"] < _RUBBISH}
    runtimes = {name: r for name, r in audio.items() if not name.startswith("cuda")}
    on_gpu = {name: r for name, r in audio.items() if name.startswith("cuda")}  # against a plain forward there

    def best(ending: str) -> str | None:
        of_kind = [name for name in runtimes if name.endswith(ending)]
        return max(of_kind, key=lambda name: float(runtimes[name]["faster_than_plain"]), default=None)

    what = f"{figures['model']} at {figures['size']}, against a plain eager float32 forward"
    report = []

    def gain(name: str | None, kind: str, goal: float) -> None:
        found = "no such runtime ran" if name is None else f"{runtimes[name]['faster_than_plain']:.2f}× ({name})"
        reached = name is not None and runtimes[name]["faster_than_plain"] >= goal
        report.append(Target(f"{what}, {kind}", f"≥ {goal:g}×", found, reached))

    if "amx_bf16" in figures["machine"]["instructions"]:
        gain(best("bf16"), "bf16", 8.0)
        gain(best("int8"), "int8", 15.0)
    else:
        gain(best(""), "best runtime", 1.3)
    # int8 is for who has images to calibrate it on: beside the fastest runtime of all, the fastest without it.
    exact = max((n for n in runtimes if "int8" not in n), key=lambda n: runtimes[n]["faster_than_plain"], default=None)
    fastest_there = max(on_gpu, key=lambda name: float(on_gpu[name]["faster_than_plain"]), default=None)
    if fastest_there is not None:
        found = f"{on_gpu[fastest_there]['faster_than_plain']:.2f}× ({fastest_there})"
        report.append(Target(f"{what} on the GPU, best runtime there", "shown", found, None))
    for name in dict.fromkeys(name for name in (best(""), exact, fastest_there) if name is not None):
        r = audio[name]
        share = f"{r['share_of_matrix_rate']:.0%}"
        report.append(Target(f"{name}: of the rate of plain matrix products of its type", "shown", share, None))
        cost = r["exits_cost"]
        report.append(
            Target(f"{name}: the chain with all exits against the backbone", "≤ 1.05", f"{cost:.3f}", cost <= 1.05)
        )
        for exit, speedup in r["speedups"].items():
            ratio = speedup["measured"] / speedup["of_flops"]
            found = f"{speedup['measured']:.2f}×, {ratio:.2f} of {speedup['of_flops']:.2f}×"
            report.append(Target(f"{name}: leaving at {exit}", "≥ 0.95 of the FLOPS speedup", found, ratio >= 0.95))
    return report


def _draw_runtimes(axes: Any, figures: Figures) -> None:
    runtimes = figures["runtimes"]
    axes.barh(list(runtimes), [r["faster_than_plain"] for r in runtimes.values()])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("times as fast as a plain eager float32 forward")
    axes.set_title(f"{figures['model']} at {figures['size']}", fontsize=9)


def _deadlines(figures: Figures) -> list[Target]:
    report = []
    for state in STATES:
        f = figures[state]
        what = f"{f['requests']} random deadlines, {figures['model']} on {figures['runtime']}, {state}"
        none, late = f["unanswered_though_it_fits"], f["late_p99_ms"]
        asked = f"{what}: no answer though the first exit's p99 fits ({f['first_exit_fits']} times)"
        report.append(Target(asked, "none", f"{none:.2%}", f["first_exit_fits"] > 0 and none == 0))
        report.append(Target(f"{what}: returned after the deadline by (p99)", "≤ 5 ms", f"{late:.2f} ms", late <= 5))
    return report


def _draw_deadlines(axes: Any, figures: Figures) -> None:
    states, parts = list(STATES), ("late_p50_ms", "late_p99_ms", "late_max_ms")
    for at, part in enumerate(parts):
        axes.bar(
            [x + 0.25 * (at - 1) for x in range(len(states))],
            [figures[s][part] for s in states],
            0.25,
            label={"late_p50_ms": "median", "late_p99_ms": "p99", "late_max_ms": "most"}[part],
        )
    axes.axhline(5, color="black", linewidth=1)
    axes.set_xticks(range(len(states)), [state.replace(", ", "\n") for state in states], fontsize=8)
    axes.set_ylabel("returned after the deadline by, ms")
    axes.set_title(f"deadlines, {figures['model']} on {figures['runtime']}", fontsize=9)
    axes.legend(fontsize=8)


def _video(figures: Figures) -> list[Target]:
    share, fps = figures["share_of_slower"], figures["fps"]["pipeline"]
    return [
        Target(f"{figures['video']}: {figures['what']}, of the slower half", "≥ 0.9", f"{share:.2f}", share >= 0.9),
        Target("… frames a second", "≥ 25", f"{fps:.1f}", fps >= 25),
    ]


def _draw_video(axes: Any, figures: Figures) -> None:
    axes.bar(list(figures["fps"]), list(figures["fps"].values()))
    axes.axhline(25, color="black", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("frames a second")
    axes.set_title(figures["video"], fontsize=9)


def _scaling(figures: Figures) -> list[Target]:
    report = []
    for kind in ("area", "batch"):
        power = round(figures["growth"][kind], 2)
        found = f"{power:.2f} ({figures['steepest'][kind]:.2f} where steepest)"
        report.append(Target(f"time grows with the {kind} to the power of", "≤ 1", found, power <= 1.0))
    extra = round(figures["exits_together"], 2)
    what = "time with all exits over the sum of what each alone adds"
    return [*report, Target(what, "≤ 1", f"{extra:.2f}", extra <= 1.0)]


def _draw_scaling(axes: Any, figures: Figures) -> None:
    for kind, times in figures["seconds"].items():
        xs, ys = [float(x) for x in times], list(times.values())
        if kind != "exits":
            axes.plot([x / xs[0] for x in xs], [y / ys[0] for y in ys], "o-", label=kind)
    top = axes.get_xlim()[1]
    axes.plot([1, top], [1, top], "k:", label="linear")
    axes.set_xlabel("times the work")
    axes.set_ylabel("times the time")
    axes.set_title(f"growth, {figures['model']} on {figures['runtime']}", fontsize=9)
    axes.legend(fontsize=8)


TINY_NETWORK = ("--model", "audiocsrnet-s", "--size", "128x64", "--rounds", "1", "--runtimes", "eager,openvino")
TINY_VIDEO = ("--frames", "8", "--size", "320x180", "--turns", "1")
BENCHES: dict[str, Bench] = {
    "runtimes": Bench((), TINY_NETWORK, _runtimes, _draw_runtimes),
    "deadlines": Bench((), ("--requests", "4", "--alone", "2"), _deadlines, _draw_deadlines),
    "video": Bench((), TINY_VIDEO, _video, _draw_video),
    "scaling": Bench((), ("--rounds", "1", "--largest", "384"), _scaling, _draw_scaling),
}


def run(name: str, folder: Path, quick: bool) -> Figures | None:
    """One benchmark in a process of its own: its figures, kept in the folder, too; None if it failed."""
    bench, path = BENCHES[name], folder / f"{name}.json"
    arguments = bench.quick if quick else bench.arguments
    command = [sys.executable, "-m", f"benchmarks.bench_{name}", *arguments, "--json", str(path)]
    if subprocess.run(command).returncode != 0:
        return None
    figures: Figures = json.loads(path.read_text("utf-8"))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("bench"), help="folder for what comes out")
    parser.add_argument("--only", default=",".join(BENCHES), help="with commas between")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := [name for name in wanted if name not in BENCHES]:
        parser.error(f"no benchmark {unknown[0]!r} (there are {', '.join(BENCHES)})")
    args.out.mkdir(parents=True, exist_ok=True)
    machine, figures, targets = describe(), {}, []
    for name in wanted:
        print(f"\n── {name}", flush=True)
        found = run(name, args.out, args.quick)
        if found is None:
            targets.append(Target(name, "to run", "failed", False))
            continue
        figures[name] = found
        targets += BENCHES[name].targets(found)
    marks = {True: "reached", False: "**missed**", None: ""}
    rows = [[t.what, t.goal, t.found, marks[t.reached]] for t in targets]
    table = markdown_table(["what", "to reach", "here", ""], rows)
    head = [in_a_line(machine) + (". **Tiny sizes: these figures mean nothing.**" if args.quick else ""), ""]

    def draw(path: Path) -> None:
        figure = blank(12, 4 * ((len(figures) + 1) // 2))
        for axes, name in zip_longest(figure.subplots(-(-len(figures) // 2), 2, squeeze=False).flat, figures):
            if name is None:
                axes.axis("off")
            else:
                BENCHES[name].draw(axes, figures[name])
        figure.savefig(path, format="png")

    report = {"machine": machine, "quick": args.quick, "targets": [vars(t) for t in targets], "figures": figures}
    contents: dict[str, Any] = {
        "benchmarks.json": json.dumps(report, indent=1) + "\n",
        "benchmarks.md": "\n".join([*head, *table]) + "\n",
    }
    write_files(args.out, {**contents, **({"benchmarks.png": draw} if figures else {})})
    print("\n" + "\n".join(f"{marks[t.reached].strip('*') or '':8} {t.found:28} {t.what} ({t.goal})" for t in targets))
    if len(figures) < len(wanted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
