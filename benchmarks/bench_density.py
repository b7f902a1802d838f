"""How much faster a density map is than filtering impulses: ``python -m benchmarks.bench_density``.

Both are measured in turn in one process, because only their ratio means something on a shared machine.
"""

from __future__ import annotations

from statistics import median
from time import perf_counter

import numpy as np
from scipy.ndimage import gaussian_filter

from crowdexit.data.density import density_map

HEIGHT, WIDTH, HEADS, ROUNDS = 1080, 1920, 100, 21


def main() -> None:
    points = np.random.default_rng(0).uniform((0, 0), (WIDTH, HEIGHT), (HEADS, 2)).astype(np.float32)
    times: dict[str, list[float]] = {"scipy gaussian_filter": [], "stride 1": [], "stride 8": []}

    def timed(name: str, start: float) -> None:
        times[name].append(1000 * (perf_counter() - start))

    for _ in range(ROUNDS):
        start = perf_counter()
        impulses = np.zeros((HEIGHT, WIDTH), np.float32)
        np.add.at(impulses, tuple(points.astype(int).T[::-1]), 1)
        gaussian_filter(impulses, 4)
        timed("scipy gaussian_filter", start)
        for stride in (1, 8):
            start = perf_counter()
            density_map(points, HEIGHT, WIDTH, stride=stride)
            timed(f"stride {stride}", start)

    rival = median(times["scipy gaussian_filter"])
    print(f"{WIDTH}×{HEIGHT}, {HEADS} heads, median of {ROUNDS}")
    for name, values in times.items():
        print(f"{name:24} {median(values):8.2f} ms   {rival / median(values):6.0f}×")


if __name__ == "__main__":
    main()
