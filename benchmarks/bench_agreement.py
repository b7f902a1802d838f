"""How far other runtimes count from eager float32: ``python -m benchmarks.bench_agreement --data heard.h5``.

Every image of a split is counted by eager float32 and by each of the others, at every exit. Printed are the mean
difference of the counts over the mean count; how far the sum of all counts is off; the median, 95th percentile and
worst of the relative differences (of counts below one: of one); by how much the mean absolute error differs, and both
errors. The goal is 1 % for bfloat16 and 3 % for int8 at most, of the first two and of the error.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe, in_a_line, keep
from crowdexit.data.store import Store
from crowdexit.evaluation.evaluate import count_samples
from crowdexit.export.manifest import is_export
from crowdexit.inference.counter import load

OTHERS = ("eager-bf16", "openvino", "openvino-bf16", "onnx")


def counts(
    model: str, runtime: str, store: Store, split: str, audio: bool
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """What each exit counts in every image of a split, and the truth."""
    counter = load(model, runtime=runtime)
    counter.exits = counter.network.exit_names
    counted = list(count_samples(counter, store, split, store.ids(split, "*"), audio=audio))
    of_exits = {name: np.array([s.results[at].count for s in counted]) for at, name in enumerate(counter.exits)}
    return of_exits, np.array([s.truth for s in counted])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-lite")
    parser.add_argument("--others", nargs="+", default=OTHERS, help="runtimes, or exported folders of the same model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--no-audio", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    report: dict[str, Any] = {}
    with Store(args.data) as store:
        expected, truth = counts(args.model, "eager", store, args.split, not args.no_audio)
        print(f"{args.model}, {len(truth)} images of {args.split}, against eager float32; {in_a_line(describe())}")
        for other in args.others:
            model, runtime = (other, "auto") if is_export(other) else (args.model, other)
            given, _ = counts(model, runtime, store, args.split, not args.no_audio)
            report[Path(other).name] = {}
            print(Path(other).name)
            for name in [name for name in expected if name in given]:  # an export may have fewer exits
                error, plain = (np.abs(of_exit[name] - truth).mean() for of_exit in (given, expected))
                off = np.abs(given[name] - expected[name])
                each = off / np.maximum(expected[name], 1.0)
                found = {
                    "difference": off.mean() / expected[name].mean(),
                    "sum": given[name].sum() / expected[name].sum() - 1,
                    "median": np.median(each),
                    "p95": np.quantile(each, 0.95),
                    "worst": each.max(),
                    "mae": error / plain - 1,
                }
                report[Path(other).name][name] = {f"{what}_percent": 100 * float(found[what]) for what in found}
                signed = {"sum", "mae"}
                line = "   ".join(f"{k} {100 * v:{'+' if k in signed else ''}.2f} %" for k, v in found.items())
                print(f"  {name:10} {line}   ({plain:.2f}, {error:.2f})", flush=True)
    keep({"machine": describe(), "model": args.model, "split": args.split, "others": report}, args.json)


if __name__ == "__main__":
    main()
