"""Collate images into batches of rows for the network."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from crowdexit.data.scene import ImageInfo
from crowdexit.data.views import (
    PIXELS_IN_FLIGHT,
    PIXELS_PER_BATCH,
    TILE_PIXELS_PER_BATCH,
    same_size_groups,
    views,
)
from crowdexit.inference.budget import Budget
from crowdexit.inference.executor import Batch, Part
from crowdexit.inference.preprocessing import AudioLike, ImageLike, Row, prepared
from crowdexit.inference.profile import LAYING, PREPARING, Profile
from crowdexit.models.network import Config
from crowdexit.models.stages import Features
from crowdexit.runtimes.batch import batch_of

Sample = tuple[ImageLike, AudioLike | None]


@dataclass(frozen=True)
class Prepared:
    """Images with their audio, ready for the network: the output of :meth:`CrowdCounter.prepare`.

    Attributes:
        scenes: one for each image. parts: their rows, collated.
        seconds: the time that preparing took.
    """

    scenes: Sequence[ImageInfo]
    parts: Sequence[Part]
    seconds: float

    def copies(self) -> list[Part]:
        """A copy of the parts for one run."""
        return [replace(part, batches=[replace(batch) for batch in part.batches]) for part in self.parts]


class Collator:
    """Prepares images for a network and collates their rows.

    Every method records its time in a profile.
    """

    def __init__(self, config: Config) -> None:
        self._config = config

    def prepare(self, sample: Sample, profile: Profile) -> tuple[ImageInfo, list[Row]]:
        """An image with its audio as rows; see :func:`crowdexit.inference.preprocessing.prepared`."""
        begun = time.perf_counter()
        made = prepared(*sample, self._config)
        profile.note(PREPARING, 1, 1000 * (time.perf_counter() - begun))
        return made

    def part(self, first: int, samples: Sequence[Sequence[Row]], profile: Profile) -> Part:
        """Collate samples, numbered from ``first`` on, into a part; only a single sample may have several batches.

        All rows of several samples share one canvas size.
        """
        rows = [row for of_one in samples for row in of_one]
        most = self.tiles_in_batch if len(samples) == 1 else self.rows_in_batch
        batches = [Batch(partial(_collated, some, profile), len(some)) for some in same_size_groups(rows, most)]
        return Part(np.arange(first, first + len(samples)), np.array([len(of_one) for of_one in samples]), batches)

    def parts(
        self,
        samples: Iterable[Sample | None],
        profile: Profile,
        scenes: list[ImageInfo],
        order: list[int | None],
        budget: Budget | None = None,
        most: int | None = None,
    ) -> Iterator[Part]:
        """Prepare samples one by one and collate them into parts, as many as run a stage together.

        Args:
            scenes: receives one entry for each image.
            order: receives for each sample the index of its scene, or None.
            budget: is notified of samples that are None.
            most: number of rows after which no further sample is read.
        """
        together: list[list[Row]] = []
        taken = 0
        begun = time.perf_counter()
        for sample in samples:
            if sample is None:
                order.append(None)
                if budget is not None:
                    budget.skip()
                begun = time.perf_counter()
                continue
            scene, rows = prepared(*sample, self._config)
            profile.note(PREPARING, 1, 1000 * (time.perf_counter() - begun))
            full = sum(map(len, together)) + len(rows) > self.rows_in_batch
            other = together and len(list(same_size_groups([*together[-1], *rows], self.rows_in_batch))) > 1
            if together and (full or other or scene.has_audio != scenes[-1].has_audio):
                yield self.part(len(scenes) - len(together), together, profile)
                together = []
            order.append(len(scenes))
            scenes.append(scene)
            together.append(rows)
            taken += len(rows)
            if most is not None and taken >= most:
                break
            begun = time.perf_counter()
        if together:
            yield self.part(len(scenes) - len(together), together, profile)

    def all_prepared(self, samples: Iterable[Sample], profile: Profile) -> Prepared:
        """Samples collated, all in memory at once."""
        begun = time.perf_counter()
        scenes: list[ImageInfo] = []
        parts = list(self.parts(samples, profile, scenes, []))
        for batch in (batch for part in parts for batch in part.batches):
            batch.state = partial(_itself, batch.state())
        return Prepared(scenes, parts, time.perf_counter() - begun)

    @cached_property
    def views(self) -> int:
        """Rows of an image of the network's shape."""
        width, height = self._config.scene
        return len(views(np.zeros((height, width, 3), np.uint8), self._config.size, self._config.view))

    @property
    def rows_in_batch(self) -> int:
        """Maximum rows that run a stage together."""
        return self._rows(PIXELS_PER_BATCH)

    @property
    def rows_in_flight(self) -> int:
        """Maximum rows that run a stage, in batches, before any runs the next."""
        return self._rows(PIXELS_IN_FLIGHT)

    @property
    def views_in_batch(self) -> int:
        """Rows of one image of the network's shape that run a stage together."""
        return min(self.views, self.rows_in_batch)

    @property
    def tiles_in_batch(self) -> int:
        """Rows of a tiled image that run a stage together; all rows of an untiled one."""
        return max(self.views_in_batch, self._rows(min(PIXELS_PER_BATCH, TILE_PIXELS_PER_BATCH)))

    def _rows(self, pixels: int) -> int:
        """Rows that fit into a number of pixels; at least one."""
        width, height = self._config.size
        return max(1, pixels // (width * height))


def _collated(rows: Sequence[Row], profile: Profile) -> Features:
    begun = time.perf_counter()
    features = batch_of([(canvas, placement) for canvas, placement, _ in rows], [mel for *_, mel in rows])
    profile.note(LAYING, len(rows), 1000 * (time.perf_counter() - begun))
    return features


def _itself(features: Features) -> Features:
    return features
