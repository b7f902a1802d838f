"""How far other runtimes count from eager float32: ``python -m benchmarks.bench_agreement --data heard.h5``.

Every picture of a split is counted by eager float32 and by each of the others, at every exit. Told are the mean
difference of the counts over the mean count, and by how much the mean absolute error is another. Asked are 1 % of
bfloat16 and 3 % of int8 at most. int8 ought to be quantised on training pictures:

    crowdexit export --precision int8 --calibrate heard.h5 --out street-int8
    python -m benchmarks.bench_agreement --data heard.h5 --others openvino-bf16 street-int8
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
        print(f"{args.model}, {len(truth)} pictures of {args.split}, against eager float32")
        for other in args.others:
            model, runtime = (other, "auto") if is_export(other) else (args.model, other)
            given, _ = counts(model, runtime, store, args.split, not args.no_audio)
            told[other] = {}
            for name, of_exit in expected.items():
                error, plain = (np.abs(c - truth).mean() for c in (given[name], of_exit))
                told[other][name] = {
                    "difference_percent": 100 * float(np.abs(given[name] - of_exit).mean() / of_exit.mean()),
                    "mae_percent": 100 * float(error / plain - 1),
                }
            worst = max(told[other].values(), key=lambda row: row["difference_percent"])["difference_percent"]
            final = told[other]["final"]
            print(
                f"{Path(other).name:16} counts differ by {final['difference_percent']:.2f} % at the final exit, "
                f"{worst:.2f} % at the worst; final MAE {final['mae_percent']:+.2f} %"
            )
            for name, row in told[other].items():
                print(f"  {name:10} {row['difference_percent']:6.2f} %   MAE {row['mae_percent']:+6.2f} %")
    if args.json is not None:
        args.json.write_text(json.dumps({"model": args.model, "split": args.split, "others": told}) + "\n", "utf-8")


if __name__ == "__main__":
    main()
