"""How far other runtimes count from eager float32: ``python -m benchmarks.bench_agreement --data heard.h5``.

Every picture of a split is counted by eager float32 and by each of the others, at every exit. Told are the mean
difference of the counts over the mean count, and by how much the mean absolute error is another. Asked are 1 % of
bfloat16 and 3 % of int8 at most, of both. int8 ought to be quantised on training pictures:

    crowdexit export --precision int8 --calibrate heard.h5 --out street-int8
    python -m benchmarks.bench_agreement --data heard.h5 --others openvino-bf16 street-int8
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe, in_a_line, keep
from crowdexit.data.store import Store
from crowdexit.inference.counter import load
from crowdexit.inference.evaluate import count_samples
from crowdexit.inference.exported import is_export

OTHERS = ("eager-bf16", "openvino", "openvino-bf16", "onnx")


def counts(
    model: str, runtime: str, store: Store, split: str, audio: bool
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """What each exit counts in every picture of a split, and the truth."""
    counter = load(model, runtime=runtime)
    counter.exits = counter.network.exit_names
    counted = list(count_samples(counter, store, split, store.ids(split, "*"), audio=audio))
    of_exits = {name: np.array([s.results[at].count for s in counted]) for at, name in enumerate(counter.exits)}
    return of_exits, np.array([s.truth for s in counted])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--others", nargs="+", default=OTHERS, help="runtimes, or exported folders of the same model")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--no-audio", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    told: dict[str, Any] = {}
    with Store(args.data) as store:
        expected, truth = counts(args.model, "eager", store, args.split, not args.no_audio)
        print(f"{args.model}, {len(truth)} pictures of {args.split}, against eager float32; {in_a_line(describe())}")
        for other in args.others:
            model, runtime = (other, "auto") if is_export(other) else (args.model, other)
            given, _ = counts(model, runtime, store, args.split, not args.no_audio)
            told[Path(other).name] = {}
            print(Path(other).name)
            for name in [name for name in expected if name in given]:  # an export may have fewer exits
                error, plain = (np.abs(of_exit[name] - truth).mean() for of_exit in (given, expected))
                apart = np.abs(given[name] - expected[name]).mean() / expected[name].mean()
                told[Path(other).name][name] = {
                    "difference_percent": 100 * float(apart),
                    "mae_percent": 100 * float(error / plain - 1),
                }
                print(f"  {name:10} counts differ by {100 * apart:5.2f} %   MAE {100 * (error / plain - 1):+6.2f} %")
    keep({"machine": describe(), "model": args.model, "split": args.split, "others": told}, args.json)


if __name__ == "__main__":
    main()
