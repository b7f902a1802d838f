"""Whether the intervals hold what they promise: ``python -m benchmarks.bench_coverage --data heard.h5``.

Every validation picture is counted once. Then, many times, a random half of them calibrates each exit, and the other,
which that calibration has not seen, tells how often the truth lies in the interval, and how wide that is. Promised is
the level on average over all such halves; a single half of a few dozen pictures strays by several per cent, and the
spread is told, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import describe, in_a_line, keep
from crowdexit.data.store import Store
from crowdexit.inference.counter import load
from crowdexit.inference.evaluate import count_samples
from crowdexit.intervals import ROOM, width

HALVES = 500


def coverage(counts: Any, truths: Any, level: float) -> dict[str, float]:
    """Per cent of truths inside, over random halves: mean and standard deviation; and the median half-width's share.

    Args:
        counts, truths: (n,) of one exit.
    """
    random = np.random.default_rng(0)
    inside, widths = [], []
    for _ in range(HALVES):
        order = random.permutation(len(counts))
        held_out, unseen = order[: len(order) // 2], order[len(order) // 2 :]
        w = width(counts[held_out].tolist(), truths[held_out].tolist(), level)
        inside.append(np.mean(np.abs(counts[unseen] - truths[unseen]) <= w * (np.maximum(counts[unseen], 0) + ROOM)))
        widths.append(w)
    return {
        "covered": 100 * float(np.mean(inside)),
        "spread": 100 * float(np.std(inside)),
        "width": float(np.median(widths)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-s")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--ids", default="*")
    parser.add_argument("--no-audio", action="store_true")
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    counter = load(args.model, runtime=args.runtime)
    counter.exits = counter.network.exit_names
    with Store(args.data) as store:
        ids = store.ids(args.split, args.ids)
        counted = list(count_samples(counter, store, args.split, ids, audio=not args.no_audio))
    truths = np.array([sample.truth for sample in counted])
    told = {}
    print(f"{args.model}, {len(ids)} pictures of {args.split}, {HALVES} random halves, level {args.level:.0%}")
    print(in_a_line(describe()))
    for at, name in enumerate(counter.exits):
        told[name] = coverage(np.array([sample.results[at].count for sample in counted]), truths, args.level)
        t = told[name]
        print(f"{name:8} {t['covered']:5.1f} % inside (± {t['spread']:.1f} a half), ± {t['width']:.2f} · (count + 10)")
    keep({"machine": describe(), "level": args.level, "pictures": len(ids), "exits": told}, args.json)


if __name__ == "__main__":
    main()
