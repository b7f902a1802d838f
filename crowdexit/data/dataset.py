"""Prepared images as training and evaluation see them: tensors, drawn so that a seed fixes every one of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from crowdexit.data.ambience import MAX_COUNT, SAMPLE_RATE, VoiceBank, simulate
from crowdexit.data.augment import ConditionRange, Conditions, View, keep_inside, random_view
from crowdexit.data.density import density_map
from crowdexit.data.log_mel import log_mel
from crowdexit.data.negatives import Negatives, cut, is_headless, random_box
from crowdexit.data.store import Store, StoredSample, StoreError, decode_image
from crowdexit.data.unlabelled import ImageFolder
from crowdexit.data.views import Placement, normalise, tiles, views

STRIDE = 8
_TRIES = 30  # to find a part of an image without heads


@dataclass(frozen=True)
class Kernel:
    """The density maps' kernel (see :func:`crowdexit.data.density.density_map`)."""

    kind: str = "gaussian"
    sigma: float = 4.0
    size: int = 15


@dataclass(frozen=True)
class Setting:
    """Everything that decides how a stored sample becomes tensors.

    Attributes:
        view: random crop and scale for training; None lays the whole image on ``canvas``.
        canvas: (width, height), for ``view`` None.
        tiles: with ``view`` None, the image as tiles of the canvas' size, T×3×H×W (no density map then).
        own_shape: with ``view`` None, the image in its own shape, scaled down to no more pixels than the canvas has.
        flip: with ``view`` None, whether half of the images are mirrored.
        takes: whether a sample's further simulated seconds are drawn as well as its own (training).
        conditions: drawn anew for each image in training, fixed in evaluation.
        hear: probability that a sample with audio is heard (modality dropout).
        voices: with a ``view``, audio is simulated for the heads that the crop shows, in place of the sample's own.
        stride: of the density map: 8 is the network's grid, 1 the full resolution of the papers.
    """

    canvas: tuple[int, int]
    view: View | None = None
    tiles: bool = False
    own_shape: bool = False
    flip: bool = False
    takes: bool = False
    conditions: ConditionRange | Conditions = field(default_factory=Conditions)
    hear: float = 1.0
    voices: VoiceBank | None = None
    stride: int = STRIDE
    kernel: Kernel = field(default_factory=Kernel)


def only_density(sample: StoredSample) -> bool:
    """Whether a sample's people are known from a density map alone (DISCO without its head annotations)."""
    return sample.density is not None and len(sample.points) == 0 and sample.count > 0


def lay_density(density: np.ndarray, placement: Placement, canvas: tuple[int, int], stride: int) -> np.ndarray:
    """A stored density map of any size over where its image lies on the canvas (width, height), its sum kept.

    Returns (height/stride, width/stride) float32.
    """
    (x, y), (w, h) = placement.offset, placement.size
    size = (max(1, w // stride), max(1, h // stride))
    shrinks = size[0] <= density.shape[1] and size[1] <= density.shape[0]
    fitted = cv2.resize(density, size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    fitted = fitted * (density.sum(dtype=np.float64) / max(float(fitted.sum(dtype=np.float64)), 1e-12))
    laid = np.zeros((canvas[1] // stride, canvas[0] // stride), np.float32)
    laid[y // stride :, x // stride :][: size[1], : size[0]] = fitted
    return laid


class CrowdDataset(Dataset[dict[str, Any]]):
    """Samples of a prepared file as tensors.

    An item is asked for by ``(index, draw)``: what is random about it depends on the seed, the draw and the
    sample alone, so that neither workers nor processes nor a resumed run change it. A plain index draws 0.

    A sample with a published density map in place of heads can only be shown whole.

    Args:
        negatives: with a ``view``, what takes the place of a share of the draws: images without anybody, with no audio.

    Items: ``image`` 3×H×W normalised (or tiles T×3×H×W), ``density`` 1×H/s×W/s (not of tiles), ``valid_mask``
    1×H/8×W/8, ``count`` (heads on the canvas), ``total`` (of the whole image), ``log_mel`` 1×96×64, ``has_audio``
    bool, ``dark`` bool (darkened by the conditions), ``id``.
    """

    def __init__(
        self,
        store: Store | ImageFolder,
        split: str,
        ids: Sequence[str],
        setting: Setting,
        seed: int = 0,
        negatives: Negatives | None = None,
    ) -> None:
        self.store, self.split, self.ids, self.setting, self.seed = store, split, list(ids), setting, seed
        self.negatives = negatives

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        s = self.setting
        rng = np.random.default_rng((self.seed, index, draw))
        sample = self.store.read(self.split, self.ids[index], with_takes=s.takes and s.voices is None)
        for_audio = np.random.default_rng((self.seed, index, draw, 1))
        chance = np.random.default_rng((self.seed, index, draw, 2))
        if s.view is not None and self.negatives is not None and chance.random() < self.negatives.share:
            audio = self._audio(sample, 0, for_audio, own=False)
            return {**self._negative(self.negatives, s.view, chance, sample.id), **audio}
        wanted = s.conditions
        conditions = wanted.draw(rng) if isinstance(wanted, ConditionRange) else wanted
        # Before any scaling: the camera is in the dark, and its grain grows with the image.
        image = conditions.apply(self._decoded(sample), rng)
        common = {
            "total": torch.tensor(sample.count, dtype=torch.float32),
            "dark": torch.tensor(conditions.brightness < 1),
            "id": sample.id,
        }
        if s.tiles:
            tensors = [torch.from_numpy(normalise(tile)) for tile in tiles(image, s.canvas)]
            valid_mask = torch.ones(len(tensors), 1, s.canvas[1] // STRIDE, s.canvas[0] // STRIDE)
            audio = self._audio(sample, sample.count, for_audio)
            return {
                "image": torch.stack(tensors),
                "valid_mask": valid_mask,
                "count": common["total"],
                **common,
                **audio,
            }
        laid = sample.density if only_density(sample) else None
        placement: Placement
        if s.view is not None:
            if laid is not None:
                raise StoreError(f"{self.store.path}: {sample.id} has only a density map: it can only be shown whole")
            image, points, placement = random_view(image, sample.points, s.view, rng)
            count = float(len(points))
            canvas = s.view.canvas
        else:
            points = sample.points
            if s.flip and rng.random() < 0.5:
                points = np.stack([image.shape[1] - points[:, 0], points[:, 1]], axis=1)
                image = np.ascontiguousarray(image[:, ::-1])
                laid = None if laid is None else np.ascontiguousarray(laid[:, ::-1])
            image, placement = views(image, s.canvas, "scale" if s.own_shape else "fit")[0]
            points, count = keep_inside(placement.points(points), placement), sample.count
            canvas = (image.shape[1], image.shape[0])
        density = self._density(points, canvas) if laid is None else lay_density(laid, placement, canvas, s.stride)
        return {
            "image": torch.from_numpy(normalise(np.ascontiguousarray(image))),
            "density": torch.from_numpy(density)[None],
            "valid_mask": torch.from_numpy(placement.valid_mask(canvas))[None],
            "count": torch.tensor(count, dtype=torch.float32),
            **common,
            **self._audio(sample, count, for_audio),
        }

    def _negative(self, negatives: Negatives, view: View, rng: np.random.Generator, id: str) -> dict[str, Any]:
        """An item with nobody in it, without its audio."""
        width, height = view.canvas
        wanted, stride = self.setting.conditions, self.setting.stride
        conditions = wanted.draw(rng) if isinstance(wanted, ConditionRange) else wanted
        image = conditions.apply(negatives.draw(rng, view.canvas, self._headless), rng)
        image = view.degradations.apply(image, rng)
        return {
            "image": torch.from_numpy(normalise(np.ascontiguousarray(image))),
            "density": torch.zeros(1, height // stride, width // stride),
            "valid_mask": torch.ones(1, height // STRIDE, width // STRIDE),
            "count": torch.tensor(0.0),
            "total": torch.tensor(0.0),
            "dark": torch.tensor(conditions.brightness < 1),
            "id": id,
        }

    def _headless(self, rng: np.random.Generator, canvas: tuple[int, int]) -> np.ndarray | None:
        """A part without heads of one of the samples, at the canvas' size; None if none was found."""
        for _ in range(_TRIES):
            sample = self.store.read(self.split, self.ids[rng.integers(len(self.ids))])
            box = random_box(rng, (sample.width, sample.height), canvas)
            if not only_density(sample) and is_headless(sample.points, box):
                return cut(self._decoded(sample), box, canvas)
        return None

    def _decoded(self, sample: StoredSample) -> np.ndarray:
        try:
            return decode_image(sample)
        except StoreError as error:
            raise StoreError(f"{self.store.path}: {error}") from error

    def _density(self, points: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
        k, stride = self.setting.kernel, self.setting.stride
        kind = cast(Any, k.kind)
        return density_map(points, canvas[1], canvas[0], kernel=kind, sigma=k.sigma, size=k.size, stride=stride)

    def _audio(
        self, sample: StoredSample, count: float, rng: np.random.Generator, *, own: bool = True
    ) -> dict[str, Any]:
        """The audio parts of an item: simulated for the ``count`` heads that it shows, or the sample's.

        What is not heard, or not the ``own`` audio of what is shown, is still handed over: a batch normalisation then
        only ever sees real audio.
        """
        s = self.setting
        has_audio = s.hear >= 1 or bool(rng.random() < s.hear)
        if s.voices is not None and s.view is not None:
            mel = log_mel(simulate(min(count, MAX_COUNT), s.voices, rng), SAMPLE_RATE)
        elif sample.log_mel is None:
            mel, has_audio = np.zeros((96, 64), np.float32), False
        else:
            takes = () if sample.takes is None else sample.takes
            mel = (sample.log_mel, *takes)[int(rng.integers(len(takes) + 1))].astype(np.float32)
            has_audio = has_audio and own
        return {"log_mel": torch.from_numpy(mel)[None], "has_audio": torch.tensor(has_audio)}


class EpochPlan(Sampler[tuple[int, int]]):
    """Which samples an epoch sees, in what order: fixed by seed and epoch, dealt out to the processes.

    Args:
        ids: of the data set.
        balance: shell patterns of ids with the share of draws each group gets; None: every sample once.
        length: draws in an epoch over all processes; None: the number of ids.
        views: in how many ways a sample is drawn, one after the other; None: a new one every time.
        seed, rank, world: of the run and the processes. The plan is padded so that each gets as many.
    """

    def __init__(
        self,
        ids: Sequence[str],
        *,
        balance: dict[str, float] | None = None,
        length: int | None = None,
        views: int | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.views = length or len(ids), views
        self.seed, self.rank, self.world, self.epoch = seed, rank, world, 0
        shares = balance or {"*": 1.0}
        self.groups: list[tuple[float, np.ndarray]] = []
        for pattern, share in shares.items():
            members = np.array([i for i, id in enumerate(ids) if fnmatchcase(id, pattern)])
            if len(members) == 0:
                raise StoreError(f"no training sample matches {pattern!r}")
            self.groups.append((share / sum(shares.values()), members))

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.epoch = epoch

    def plan(self) -> list[tuple[int, int]]:
        """The whole epoch over all processes, as (index, draw)."""
        rng = np.random.default_rng((self.seed, self.epoch))
        chosen = []
        rest = self.length
        for number, (share, members) in enumerate(self.groups):
            last = number == len(self.groups) - 1
            n = rest if last else min(rest, round(share * self.length))
            rest -= n
            rounds = [rng.permutation(members) for _ in range(-(-n // len(members)))]
            chosen.append(np.concatenate(rounds)[:n] if rounds else members[:0])
        order = rng.permutation(np.concatenate(chosen))
        draws = [(int(i), self.epoch * self.length + k) for k, i in enumerate(order)]
        if self.views is not None:
            times: Counter[int] = Counter()
            for k, (i, _) in enumerate(draws):
                draws[k] = (i, (self.epoch + times[i]) % self.views)
                times[i] += 1
        while len(draws) % self.world:
            draws.append(draws[len(draws) % self.length])
        return draws

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.plan()[self.rank :: self.world])

    def __len__(self) -> int:
        return -(-self.length // self.world)


class MixedDataset(Dataset[dict[str, Any]]):
    """Labelled samples, and behind them unlabelled ones; an item's ``unlabelled`` (bool) tells which it is.

    What stands for the truth of an unlabelled item means nothing.
    """

    def __init__(self, labelled: Dataset[dict[str, Any]], unlabelled: Dataset[dict[str, Any]]) -> None:
        self.labelled, self.unlabelled = cast(Any, labelled), cast(Any, unlabelled)

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = key if isinstance(key, tuple) else (key, 0)
        first = len(self.labelled)
        item = self.labelled[index, draw] if index < first else self.unlabelled[index - first, draw]
        return {**item, "unlabelled": torch.tensor(index >= first)}


class MixedPlan(Sampler[tuple[int, int]]):
    """An epoch of labelled samples with unlabelled ones spread evenly among them.

    Args:
        labelled, unlabelled: the plans of the two; the latter is as long as its share asks for.
        first: index at which a :class:`MixedDataset` begins with unlabelled samples.
    """

    def __init__(self, labelled: EpochPlan, unlabelled: EpochPlan, first: int) -> None:
        self.labelled, self.unlabelled, self.first = labelled, unlabelled, first

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer before each epoch."""
        self.labelled.set_epoch(epoch)
        self.unlabelled.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        real, fake = list(self.labelled), [(self.first + index, draw) for index, draw in self.unlabelled]
        # Each at the middle of its stretch of the epoch, so that every batch has its share.
        at = [((k + 0.5) / len(part), item) for part in (real, fake) for k, item in enumerate(part)]
        return (item for _, item in sorted(at))

    def __len__(self) -> int:
        return len(self.labelled) + len(self.unlabelled)
