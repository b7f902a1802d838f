"""Cache the frozen backbone's features of the training samples on disk, to train branches without running it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from crowdexit.data.classes import ClassDataset
from crowdexit.data.dataset import CrowdDataset
from crowdexit.models.network import MultiExitNetwork
from crowdexit.models.stages import Features
from crowdexit.training.losses import Batch
from crowdexit.training.modules import TrainingError, record

MANIFEST = "cache.json"
_INPUT_KEYS = ("image", "log_mel", "has_audio", "valid_mask")  # what no loss asks for


def fingerprints(
    network: MultiExitNetwork, dataset: CrowdDataset | ClassDataset, places: Collection[int], precision: str
) -> dict[str, str]:
    """What a cache has to agree in: the ``places``, the ``network`` up to the last of them, and the ``data``."""
    weights = hashlib.sha256(json.dumps(network.config.to_dict()).encode())
    for stage in list(network.stages)[: max(places) + 1]:
        for key, tensor in sorted(stage.state_dict().items()):
            weights.update(key.encode())
            weights.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    file = Path(dataset.store.path).stat()
    seen: tuple[Any, ...]
    if isinstance(dataset, CrowdDataset):
        seen = dataset.setting, None if dataset.negatives is None else dataset.negatives.identity()
    else:
        seen = dataset.size, dataset.augment
    header = (file.st_size, file.st_mtime_ns, dataset.split, dataset.ids, dataset.seed, seen, precision)
    return {
        "places": ",".join(map(str, sorted(places))),
        "network": weights.hexdigest(),
        "data": hashlib.sha256(repr(header).encode()).hexdigest(),
    }


class FeatureCache:
    """A folder of ``.npy`` files with a row for each view of each sample, as far as the bound on their size goes.

    A row has the visual features after every place with branches, the audio's vector, and all of the sample that
    losses ask for; in the types they were computed in, so that nothing is lost. Rows beyond the bound are not kept,
    their samples go through the backbone each time. A row counts once it is whole, so that a run killed while it
    writes loses no more than that row.

    Args:
        folder: of the cache; made if there is none.
        network, dataset: what is computed, and of what.
        views: rows a sample.
        places: stages after which features are kept.
        limit: of all files together, bytes.
        precision: in which the backbone runs; part of what the cache has to agree in.

    Raises:
        TrainingError: if the folder holds a cache of another network, other data or other places, is damaged, has
            no room on its disk, or the bound is below one row.
    """

    def __init__(
        self,
        folder: Path,
        network: MultiExitNetwork,
        dataset: CrowdDataset | ClassDataset,
        *,
        views: int,
        places: Collection[int],
        limit: int,
        precision: str,
    ) -> None:
        self.folder, self.views, self.places = folder, views, tuple(sorted(places))
        self._arrays: dict[str, np.ndarray] | None = None
        prints = fingerprints(network, dataset, places, precision)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        network.eval()  # the example leaves no trace in running statistics
        with torch.no_grad(), autocast:
            example = default_collate([dataset[0]])
            seen = dict(_through(network, example, self.places))
        self.token_grids = {stage: features.token_grid for stage, features in seen.items()}
        row = self._row(example, seen)
        size = sum(tensor[0].numel() * tensor.element_size() for tensor in row.values()) + 1
        self.rows = min(len(dataset) * views, limit // size)
        if self.rows == 0:
            raise TrainingError(f"cache: one sample needs {size / 1e6:.1f} MB, more than the limit for the whole cache")
        self.types = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in row.items()}
        header = {**prints, "rows": self.rows, "types": self.types}
        if (folder / MANIFEST).exists():
            self._check(header)
        else:
            self._make(header, {name: tuple(tensor.shape[1:]) for name, tensor in row.items()}, size)

    def _check(self, header: dict[str, Any]) -> None:
        try:
            there = json.loads((self.folder / MANIFEST).read_text("utf-8"))
            differs = [key for key in header if there[key] != header[key]]
            self._open()
        except (OSError, ValueError, KeyError, TypeError):
            raise TrainingError(f"{self.folder}: the feature cache is damaged; delete the folder") from None
        if differs:
            what = {"network": "another network", "data": "other data", "places": "other places"}.get(
                differs[0], "another size"
            )
            raise TrainingError(f"{self.folder}: a feature cache of {what}; name another folder, or delete it")

    def _make(self, header: dict[str, Any], shapes: dict[str, tuple[int, ...]], size: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Memory maps have holes until they are written: a disk that is full then would end the process.
            free = shutil.disk_usage(self.folder).free
            if self.rows * size > free:
                raise TrainingError(
                    f"{self.folder}: the feature cache needs {self.rows * size / 1e9:.1f} GB, and {free / 1e9:.1f} GB "
                    "are free; set a lower cache.gigabytes"
                )
            for name, shape in {**shapes, "whole": ()}.items():
                dtype = np.bool_ if name == "whole" else _stored_as(self.types[name])
                np.lib.format.open_memmap(
                    self.folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(self.rows, *shape)
                )
            part = self.folder / f"{MANIFEST}.part"
            part.write_text(json.dumps(header), "utf-8")
            part.replace(self.folder / MANIFEST)
        except OSError as error:
            raise TrainingError(f"{self.folder}: cannot create the feature cache ({error.strerror})") from None

    def _open(self) -> dict[str, np.ndarray]:
        """The files as memory maps, opened by each process that asks."""
        if self._arrays is None:
            self._arrays = {
                name: np.lib.format.open_memmap(self.folder / f"{name}.npy", mode="r+")
                for name in (*self.types, "whole")
            }
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": None}  # a worker opens the files itself, rather than be sent their content

    @staticmethod
    def _row(batch: Batch, seen: dict[int, Features]) -> dict[str, Tensor]:
        """By file name, what is kept of a batch and its features."""
        header = {key: value for key, value in batch.items() if isinstance(value, Tensor) and key not in _INPUT_KEYS}
        row = {f"sample-{key}": value for key, value in header.items() if key != "row"}
        for stage, features in seen.items():
            row[f"visual-{stage}"] = features.visual
            if features.audio is not None:
                row[f"audio-{stage}"] = features.audio
            row |= {"has_audio": features.has_audio, "valid_mask": features.valid_mask}
        return row

    def row_of(self, index: int, view: int) -> int:
        """Where a view of a sample is kept, if it is within the bound."""
        return index * self.views + view

    def has(self, row: int) -> bool:
        """Whether a row is there and whole."""
        return row < self.rows and bool(self._open()["whole"][row])

    def read(self, row: int) -> dict[str, Tensor]:
        """A whole row by file name."""
        return {
            name: torch.from_numpy(np.array(self._open()[name][row])).view(getattr(torch, kind))
            for name, kind in self.types.items()
        }

    def write(self, rows: Sequence[int], batch: Batch, seen: dict[int, Features]) -> None:
        """Keep what there is room for of a batch and its features at all places."""
        arrays = self._open()
        for name, tensor in self._row(batch, seen).items():
            kind = self.types[name]
            values = tensor.detach().to("cpu", getattr(torch, kind))
            if kind == "bfloat16":
                values = values.view(torch.int16)  # NumPy does not know it
            array = values.numpy()
            for number, row in enumerate(rows):
                if row < self.rows:
                    arrays[name][row] = array[number]
        for row in rows:
            if row < self.rows:
                arrays["whole"][row] = True


def _stored_as(kind: str) -> str:
    return "int16" if kind == "bfloat16" else kind


class CachedDataset(Dataset[dict[str, Any]]):
    """A data set that hands out what the cache has in place of images."""

    def __init__(self, dataset: CrowdDataset | ClassDataset, cache: FeatureCache) -> None:
        self.dataset, self.cache, self.ids = dataset, cache, dataset.ids

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        index, view = key
        row = self.cache.row_of(index, view)
        if self.cache.has(row):
            return {"id": self.ids[index], "stored": self.cache.read(row)}
        return {"row": row, **self.dataset[key]}


def collate(items: Sequence[dict[str, Any]]) -> Batch:
    """A batch of what is kept and what is not, in the order of ``items``.

    ``stored`` are the rows of the former by file name, ``fresh`` is the batch of the latter, either may be None, and
    ``order`` brings the two, one behind the other, back into the items' order.
    """
    kept = [i for i, item in enumerate(items) if "stored" in item]
    rest = [i for i, item in enumerate(items) if "stored" not in item]
    order = torch.tensor(kept + rest).argsort()
    stored = default_collate([items[i]["stored"] for i in kept]) if kept else None
    fresh = default_collate([items[i] for i in rest]) if rest else None
    header: dict[str, list[Tensor]] = defaultdict(list)
    for name, value in (stored or {}).items():
        if name.startswith("sample-"):
            header[name.removeprefix("sample-")].append(value)
    for name, value in (fresh or {}).items():
        if isinstance(value, Tensor) and name not in (*_INPUT_KEYS, "row"):
            header[name].append(value)
    batch = {name: torch.cat(parts)[order] for name, parts in header.items()}
    return {"id": [item["id"] for item in items], **batch, "stored": stored, "fresh": fresh, "order": order}


def _through(network: MultiExitNetwork, batch: Batch, places: Collection[int]) -> Iterator[tuple[int, Features]]:
    """Run the backbone as far as the last place, and stop at each with the features there."""
    features = record(batch)
    for stage in range(max(places) + 1):
        features = network.stages[stage](features)
        if stage in places:
            yield stage, features


@torch.no_grad()
def iter_features(
    network: MultiExitNetwork, batch: Batch, places: Collection[int], cache: FeatureCache | None = None
) -> Iterator[tuple[int, Features]]:
    """The features of a batch at each place with branches, in order: from the backbone, the cache, or both.

    Args:
        places: stages after which features are wanted.
        cache: whose :func:`collate` made the batch; what it lacks is written to it.
    """
    if cache is None:
        yield from _through(network, batch, places)
        return
    fresh, stored = batch["fresh"], batch["stored"]
    computed = _through(network, fresh, places) if fresh is not None else None
    kept = {}
    for stage in sorted(places):
        parts = []
        if stored is not None:
            parts.append(_stored_features(cache, stored, stage))
        if computed is not None:
            _, features = next(computed)
            kept[stage] = features
            parts.append(features)
        yield stage, parts[0] if len(parts) == 1 else _joined(parts[0], parts[1]).select(batch["order"])
    if fresh is not None and set(cache.places) <= set(places):
        cache.write(fresh["row"].tolist(), fresh, kept)


def _stored_features(cache: FeatureCache, stored: dict[str, Tensor], stage: int) -> Features:
    visual = stored[f"visual-{stage}"]
    return Features(
        visual,
        log_mel=torch.zeros(len(visual), 1, 96, 64, device=visual.device),  # it has been heard
        has_audio=stored["has_audio"],
        valid_mask=stored["valid_mask"],
        audio=stored.get(f"audio-{stage}"),
        token_grid=cache.token_grids[stage],
    )


def _joined(one: Features, other: Features) -> Features:
    """The records of two parts of a batch as one, stored ones first."""
    both = {
        field.name: torch.cat([value, getattr(other, field.name)])
        for field in fields(one)
        if isinstance(value := getattr(one, field.name), Tensor)
    }
    return replace(one, **cast(Any, both))
