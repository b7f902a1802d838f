"""Whether images unlike the training images are reported: ``python -m benchmarks.bench_familiar --data heard.h5``.

Three figures. How many validation images are not familiar: few should be. How many images without people are either not
familiar or counted below 1: drawn patterns and, with ``--empty``, images of a folder, with ``--small``, mosaics of
small images. And how many crops with one to three people close to the camera, cut from validation images and enlarged,
are not familiar or counted within 1 person.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import describe, in_a_line, keep
from crowdexit.data.classes import ClassStore
from crowdexit.data.image import decode_pixels, read_pixels
from crowdexit.data.negatives import cut, mosaic, pattern, shapes
from crowdexit.data.store import Store
from crowdexit.errors import CrowdExitError
from crowdexit.inference.counter import CrowdCounter, load

CANVAS = (1024, 768)
ENDINGS = {".jpg", ".jpeg", ".png"}


def patterns(number: int) -> Iterator[NDArray[np.uint8]]:
    """Drawn patterns, every third with shapes and writing over it."""
    for seed in range(number):
        random = np.random.default_rng(seed)
        drawn = pattern(random, *CANVAS)
        yield shapes(random, drawn) if seed % 3 == 0 else drawn


def mosaics(path: Path, number: int) -> Iterator[NDArray[np.uint8]]:
    """Mosaics of a prepared classification set's images, each of one size."""
    with ClassStore(path) as store:
        split = store.splits()[-1]
        length = len(store.labels(split))
        for seed in range(number):
            random = np.random.default_rng(seed)
            yield mosaic(random, *CANVAS, lambda of=random: store.image(split, int(of.integers(length))))


def close_ups(store: Store, split: str, number: int) -> Iterator[tuple[NDArray[np.uint8], int]]:
    """Crops with one to three heads in them, enlarged to 1024×768, and how many there are.

    The crops are 90 to 240 pixels high, where heads are up to a third of that; no head is nearer than 8 pixels to a
    border, inside or outside.
    """
    random = np.random.default_rng(0)
    ids = store.ids(split, "B_*")
    made = 0
    while made < number:
        sample = store.read(split, ids[random.integers(len(ids))])
        height = int(random.integers(90, 241))
        width = height * CANVAS[0] // CANVAS[1]
        x, y = int(random.integers(sample.width - width + 1)), int(random.integers(sample.height - height + 1))
        within = sample.points - (x, y)

        def inside(margin: int, of: NDArray[np.float32] = within, w: int = width, h: int = height) -> int:
            return int(((of > margin) & (of < np.array([w, h]) - margin)).all(1).sum())

        if 1 <= inside(8) <= 3 and inside(8) == inside(-8):
            made += 1
            yield cut(decode_pixels(sample.image.tobytes()), (x, y, width, height), CANVAS), inside(8)


def unfamiliar_or_near(counter: CrowdCounter, image: NDArray[np.uint8], truth: float, by: float) -> tuple[bool, bool]:
    """Whether an image is not familiar, and whether that or a final count nearer to the truth than ``by``."""
    sums = counter.predictor.feature_sums(image)
    assert counter.familiarity is not None
    assert sums is not None
    unfamiliar = not counter.familiarity.is_familiar(sums)
    return unfamiliar, unfamiliar or abs(counter.count(image).count - truth) <= by


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-lite")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--empty", type=Path, help="a folder of images without people")
    parser.add_argument("--small", type=Path, help="a prepared classification set without people")
    parser.add_argument("--number", type=int, default=100, help="of patterns, mosaics and crops")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    counter = load(args.model, runtime=args.runtime)
    if counter.familiarity is None:
        raise SystemExit(f"{args.model} has no statistics of its training images: run `crowdexit calibrate`")
    print(in_a_line(describe()))
    figures: dict[str, dict[str, float]] = {}

    def report(what: str, of: list[tuple[bool, bool]], goal: str) -> None:
        unfamiliar, good = (100 * float(np.mean([pair[i] for pair in of])) for i in (0, 1))
        figures[what] = {"images": len(of), "unfamiliar": unfamiliar, "good": good}
        print(f"{what}: {len(of)} images, {unfamiliar:.1f} % not familiar, {good:.1f} % {goal}", flush=True)

    empty = "not familiar or counted below 1"
    report("patterns", [unfamiliar_or_near(counter, image, 0, 1) for image in patterns(args.number)], empty)
    if args.small is not None:
        report("mosaics", [unfamiliar_or_near(counter, im, 0, 1) for im in mosaics(args.small, args.number)], empty)
    if args.empty is not None:
        paths = sorted(path for path in args.empty.rglob("*") if path.suffix.lower() in ENDINGS)
        report("folder", [unfamiliar_or_near(counter, read_pixels(path), 0, 1) for path in paths], empty)
    with Store(args.data) as store:
        near = [unfamiliar_or_near(counter, image, n, 1) for image, n in close_ups(store, args.split, args.number)]
        report("close-ups", near, "not familiar or within 1 person")
        for group in ("*", "A_*", "B_*"):
            try:
                ids = store.ids(args.split, group)
            except CrowdExitError:
                continue
            images = (decode_pixels(store.read(args.split, id).image.tobytes()) for id in ids)
            flags = [
                not counter.familiarity.is_familiar(sums)
                for i in images
                if (sums := counter.predictor.feature_sums(i)) is not None
            ]
            report(f"{args.split} {group}", [(flag, not flag) for flag in flags], "familiar")
    keep({"machine": describe(), "figures": figures}, args.json)


if __name__ == "__main__":
    main()
