"""What every exit counts where nobody is: ``python -m benchmarks.bench_empty``.

Textures that training does not draw (zebra, rosettes, bricks, weave, scales, writing); patterns as training draws them;
with ``--small`` mosaics of small images, single ones enlarged, and these with such textures on them; with ``--data``
empty parts of validation images enlarged; with ``--empty`` the images of a folder. The mean count and the worst, of
each exit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from benchmarks.bench_familiar import CANVAS, ENDINGS, mosaics, patterns
from benchmarks.machine import describe, in_a_line, keep
from crowdexit.data.classes import ClassStore
from crowdexit.data.image import read_pixels
from crowdexit.data.negatives import cut, is_headless, random_box
from crowdexit.data.store import Store, decode_image
from crowdexit.inference.counter import CrowdCounter, load

Image = NDArray[np.uint8]
Share = NDArray[np.float32]  # H×W, from one colour to another


def _waves(random: np.random.Generator, width: int, height: int, sigma: float) -> Share:
    """Smooth noise of σ 1."""
    noise = cv2.GaussianBlur(random.standard_normal((height, width), np.float32), (0, 0), sigma)
    return np.asarray(noise / noise.std(), np.float32)


def zebra(random: np.random.Generator, width: int, height: int) -> Share:
    """Stripes that bend and fork."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    turned = x * np.cos(angle := random.uniform(0, np.pi)) + y * np.sin(angle)
    bent = turned / random.uniform(4, 30) + random.uniform(1, 5) * _waves(random, width, height, random.uniform(15, 60))
    return np.asarray(1 / (1 + np.exp(-random.uniform(2, 10) * np.sin(bent))), np.float32)


def rosettes(random: np.random.Generator, width: int, height: int) -> Share:
    """Open rings, dark around a half-dark middle, as on a leopard."""
    share = np.zeros((height, width), np.float32)
    radius = random.uniform(5, 26)
    for _ in range(int(width * height / (3.2 * radius) ** 2)):
        centre = int(random.integers(width)), int(random.integers(height))
        axes = int(radius * random.uniform(0.6, 1.2)), int(radius * random.uniform(0.6, 1.2))
        turn, first = random.uniform(0, 360), random.uniform(0, 360)
        cv2.ellipse(share, centre, axes, turn, 0, 360, 0.45, cv2.FILLED)
        line = max(1, int(radius * random.uniform(0.2, 0.5)))
        cv2.ellipse(share, centre, axes, turn, first, first + random.uniform(200, 330), 1.0, line)
    return np.asarray(cv2.GaussianBlur(share, (0, 0), random.uniform(0.5, 2)), np.float32)


def bricks(random: np.random.Generator, width: int, height: int) -> Share:
    """Rows of bricks, each of a shade of its own, in mortar."""
    share = np.zeros((height, width), np.float32)
    tall = int(random.integers(6, 40))
    wide = int(tall * random.uniform(1.5, 3.5))
    for row, top in enumerate(range(0, height, tall)):
        for left in range(-(row % 2) * wide // 2, width, wide):
            shade = float(random.uniform(0.4, 1))
            cv2.rectangle(share, (left + 1, top + 1), (left + wide - 2, top + tall - 2), shade, cv2.FILLED)
    return share


def weave(random: np.random.Generator, width: int, height: int) -> Share:
    """Threads over and under each other."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    side = random.uniform(4, 30)
    across, down = np.abs(np.sin(np.pi * x / side)), np.abs(np.sin(np.pi * y / side))
    over = (x // side + y // side) % 2
    return np.asarray(np.where(over == 0, across, down), np.float32)


def scales(random: np.random.Generator, width: int, height: int) -> Share:
    """Round scales in rows that cover each other, each lighter towards its edge."""
    share = np.zeros((height, width), np.float32)
    radius = int(random.integers(6, 36))
    for row, top in enumerate(range(height + radius, -radius, -radius)):
        for left in range(-(row % 2) * radius, width + radius, 2 * radius):
            for step in range(radius, 0, -2):
                cv2.circle(share, (left, top), step, step / radius, cv2.FILLED)
    return share


def writing(random: np.random.Generator, width: int, height: int) -> Share:
    """Lines of letters."""
    page = np.zeros((height, width), np.uint8)
    size, font = random.uniform(0.4, 1.6), int(random.integers(0, 7))
    for base in range(0, height + 40, int(32 * size) + 4):
        text = "".join(random.choice(list("abcdefghijklmnopqrstuvwxyz  "), 120))
        cv2.putText(page, text, (-int(random.integers(30)), base), font, size, (255,), 1 + int(2 * size), cv2.LINE_AA)
    return np.asarray(page / 255, np.float32)


TEXTURES: tuple[Callable[[np.random.Generator, int, int], Share], ...] = (
    *(zebra, rosettes, bricks, weave, scales, writing),
)


def textures(number: int) -> Iterator[Image]:
    """Such textures in natural and other colours, with grain, on unevenly lit grounds."""
    for seed in range(number):
        random = np.random.default_rng(seed)
        share = TEXTURES[seed % len(TEXTURES)](random, *CANVAS)[..., None]
        one, other = random.uniform(0, 255, (2, 3)) if seed % 2 else random.uniform(20, 235, (2, 1)) * (1.05, 0.95, 0.8)
        light = 1 + 0.2 * _waves(random, *CANVAS, CANVAS[0] / 8)[..., None]
        grain = random.normal(0, random.uniform(0, 15), (CANVAS[1], CANVAS[0], 1))
        yield np.clip((one + (other - one) * share) * light + grain, 0, 255).astype(np.uint8)


def _small_images(path: Path, number: int) -> Iterator[tuple[int, np.random.Generator, Image]]:
    """Images of a prepared classification set's last split, each with its number and random numbers of its own."""
    with ClassStore(path) as store:
        split = store.splits()[-1]
        length = len(store.labels(split))
        for seed in range(number):
            random = np.random.default_rng(seed)
            yield seed, random, store.image(split, int(random.integers(length)))


def enlarged(path: Path, number: int) -> Iterator[Image]:
    """Single small images of a prepared classification set's last split, made 4 to 20 times as large."""
    for _, random, small in _small_images(path, number):
        side = int(small.shape[0] * random.uniform(4, 20))
        yield np.asarray(cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC), np.uint8)


def coats(path: Path, number: int) -> Iterator[Image]:
    """Single small images enlarged to 1024×768 or a half of it, with such textures in their light: coats of animals."""
    for seed, random, small in _small_images(path, number):
        size = CANVAS if seed % 2 else (CANVAS[0] // 2, CANVAS[1] // 2)
        ground = cv2.resize(small, size, interpolation=cv2.INTER_CUBIC)
        share = TEXTURES[seed % len(TEXTURES)](random, *size)[..., None]
        detail = (share - share.mean()) / (share.std() + 1e-6)
        yield np.clip(ground * (1 + random.uniform(0.1, 0.5) * detail), 0, 255).astype(np.uint8)


def empty_parts(store: Store, split: str, number: int) -> Iterator[Image]:
    """Parts without heads of a split's images, enlarged to 1024×768."""
    ids, made, random = store.ids(split), 0, np.random.default_rng(0)
    while made < number:
        sample = store.read(split, ids[random.integers(len(ids))])
        box = random_box(random, (sample.width, sample.height), CANVAS)
        if is_headless(sample.points, box):
            made += 1
            yield cut(decode_image(sample), box, CANVAS)


def counted(counter: CrowdCounter, images: Iterator[Image]) -> dict[str, list[float]]:
    """The counts by exit."""
    counts: dict[str, list[float]] = {}
    for image in images:
        for result in counter.stream(image):
            counts.setdefault(result.exit, []).append(float(result.count))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="audiocsrnet-lite")
    parser.add_argument("--exits", help="with commas between; default: all")
    parser.add_argument("--data", type=Path, help="a prepared file, for its empty parts")
    parser.add_argument("--split", default="val")
    parser.add_argument("--small", type=Path, help="a prepared classification set without people")
    parser.add_argument("--empty", type=Path, help="a folder of images without people")
    parser.add_argument("--number", type=int, default=60, help="of each kind")
    parser.add_argument("--runtime", default="auto")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    counter = load(args.model, runtime=args.runtime, exits=args.exits.split(",") if args.exits else None)
    print(f"{args.model}, {counter.chain.runtime}; {in_a_line(describe())}")
    kinds: dict[str, Iterator[Image]] = {"textures": textures(args.number), "patterns": patterns(args.number)}
    if args.small is not None:
        kinds |= {kind.__name__: kind(args.small, args.number) for kind in (mosaics, enlarged, coats)}
    if args.empty is not None:
        paths = sorted(path for path in args.empty.rglob("*") if path.suffix.lower() in ENDINGS)
        kinds["folder"] = (read_pixels(path) for path in paths)
    figures: dict[str, Any] = {}

    def told(kind: str, images: Iterator[Image]) -> None:
        figures[kind] = counted(counter, images)
        each = "  ".join(f"{exit} {np.mean(c):.2f} ({max(c):.1f})" for exit, c in figures[kind].items())
        print(f"{kind:9} {len(next(iter(figures[kind].values()))):4} images   mean (worst): {each}", flush=True)

    for kind, images in kinds.items():
        told(kind, images)
    if args.data is not None:
        with Store(args.data) as store:
            told("parts", empty_parts(store, args.split, args.number))
    keep({"machine": describe(), "counts": figures}, args.json)


if __name__ == "__main__":
    main()
