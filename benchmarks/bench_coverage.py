"""Whether the intervals hold what they promise: ``python -m benchmarks.bench_coverage --data heard.h5``.

Every validation image is counted once. Then each of them in turn is left out, the others calibrate each exit, and it
tells whether the truth lies in its interval. Promised is the level over all images; it is reported for groups of them
(``--groups 'A_*,B_*'``) too. ``--held-out counts.csv`` gives the widths their shape, as of ``crowdexit calibrate``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from benchmarks.machine import describe, in_a_line, keep
from crowdexit.calibration.intervals import Intervals, thirds, width
from crowdexit.data.store import Store
from crowdexit.evaluation.cross_fit import read_counts
from crowdexit.evaluation.evaluate import count_samples
from crowdexit.inference.counter import load


def covered(
    counts: list[float],
    truths: list[float],
    level: float,
    cross_fitted: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[list[bool], list[float]]:
    """Whether each truth lies in the interval that the other images calibrate, and that interval's half-width.

    Args:
        counts, truths: of one exit. cross_fitted: as of :func:`crowdexit.calibration.intervals.thirds`.
    """
    inside, halves = [], []
    for left_out, (count, truth) in enumerate(zip(counts, truths, strict=True)):
        others = [[v for i, v in enumerate(values) if i != left_out] for values in (counts, truths)]
        by_size = thirds(others[0], others[1], level, cross_fitted)
        made = Intervals(
            level,
            {"": width(others[0], others[1], level)},
            without_audio_thirds={} if by_size is None else {"": by_size},
        )
        half = made.half_width("", count, has_audio=False)
        assert half is not None
        inside.append(abs(count - truth) <= half)
        halves.append(half)
    return inside, halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-lite")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--groups", default="*", help="shell patterns of ids, with commas between")
    parser.add_argument("--no-audio", action="store_true")
    parser.add_argument("--level", type=float, default=0.9)
    parser.add_argument("--held-out", type=Path, help="what crowdexit cross-fit wrote")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    cross_fitted = {} if args.held_out is None else read_counts(args.held_out)
    counter = load(args.model, runtime=args.runtime)
    counter.exits = counter.network.exit_names
    with Store(args.data) as store:
        ids = store.ids(args.split)
        counted = list(count_samples(counter, store, args.split, ids, audio=not args.no_audio))
    truths = [sample.truth for sample in counted]
    report: dict[str, dict[str, dict[str, float]]] = {}
    print(f"{args.model}, {len(ids)} images of {args.split}, each left out in turn, level {args.level:.0%}")
    print(in_a_line(describe()))
    for at, name in enumerate(counter.exits):
        counts = [sample.results[at].count for sample in counted]
        inside, halves = map(np.array, covered(counts, truths, args.level, cross_fitted.get(name)))
        report[name] = {}
        for group in args.groups.split(","):
            chosen = [fnmatchcase(id, group) for id in ids]
            one = {"covered": 100 * float(np.mean(inside[chosen])), "half_width": float(np.median(halves[chosen]))}
            report[name][group] = one
            print(f"{name:8} {group:6} {one['covered']:5.1f} % inside, ± {one['half_width']:.1f} people (median)")
    keep({"machine": describe(), "level": args.level, "images": len(ids), "exits": report}, args.json)


if __name__ == "__main__":
    main()
